"""llama.cpp: the state of slots of llama-server as pages of a store.

slotfile   the files that llama-server writes
states     pages out of them, and files out of pages
identity   what the pages of one server have to have in common
trust      whether a restore had an effect
"""
