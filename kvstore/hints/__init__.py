"""KV hints: what a caller knows of the future of a prompt, in the field's request language, as values that are checked.

limits    bounds on everything that is sent
actions   the actions that are executed, and their payloads
envelope  the message: read from JSON, from a dict, or from an engine's own struct; a bound that is broken is an answer
outcome   the answer to each action

Knows no store. Hints reach one by `KVStore.hint` (kvstore/base.py), which says how a door of an engine calls it.
"""
