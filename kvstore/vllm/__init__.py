"""vLLM: a front with OpenAI's API before one vLLM server that has our connector in it.

front     the HTTP side: admission, requests in, answers on, streams event by event
books     what is inside: tickets, the queue, the time in which the engine had something to do
engine    the calls of vLLM's server; counters: what its /metrics say; metrics: ours, made of both
seen      which prompts went to this engine lately, for routers that ask
command   how a vLLM server with our connector is started

The store itself is in vLLM's processes (`connectors/vllm`); nothing here holds a page.
"""
