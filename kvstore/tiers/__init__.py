"""Places for bytes: blocking, batched, with no bookkeeping.

base           what a tier is
memory         the reference: a dict
host           the slab that every byte passes through
memory_limit   how much memory may be taken
disk           a slab file with an index in LMDB
redis          pages shared by machines
"""
