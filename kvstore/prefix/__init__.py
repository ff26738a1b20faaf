"""Does a conversation's prompt begin with the prompt of the turn before? What breaks that, by name, and what it costs.

A prefix cache reuses what two prompts share from their first token on. A chat template that rewrites what it has said
before takes that away, and no cache can tell: all it sees is other tokens. This room renders, compares and names.

child         a chat template rendered by the rules of transformers, in a process of its own
rendering     that process: bounded in time and output
template      a model's template and special tokens, from a directory, a hub id or a file
tokens        its tokenizer, or a stand-in that says so
shapes        the conversations that are tried
difference    where two prompts part, in tokens and pages, and a window around it
mechanisms    the ways in which prefixes break, with what can be done about each
explain       from two prompts of a conversation to a mechanism
diagnosis     all shapes of one template
requests      OpenAI-style requests as they come from a log or a server
changes       what a client changed between two requests
spans         repeated spans that are no prefixes
traffic       sessions of real requests, followed one after another within bounds
answers       which answers the next turn can begin with, by token ids while they come
answer_trials learns that of a template
fingerprint   one hash over fixed renderings, to tell engines apart
"""
