"""llama.cpp: a front with OpenAI's API before a llama-server, whose slots are filled from the store and saved to it.

front     the HTTP side: requests in, answers on, streams event by event
seat      one request with a slot and the store: restore, judge, save; served: the server and its store, found out anew
server    the calls of a llama-server; requests: what is read of requests and answers
slots     who has which slot, and what is in it
life      whether the server is still the one that was identified
process   a llama-server that is started here; child: that process; folder: the place of slot files

States become pages in `connectors/llamacpp`, which knows no HTTP.
"""
