"""Prompts as paths of block hashes, and the tree that finds the longest known prefix.

`hashing` turns tokens into chained block hashes under a namespace root; `tree` keeps values along paths of them. Pure
data structures: no I/O, no threads, no clock, and no knowledge of tiers or engines.
"""
