"""Eviction policies: orders over keys that hold no data, know no tier and read no clock.

`policy` is the interface; `registry` makes a policy by name; `lru`, `sieve` and `s3fifo` are orders under the
priorities of `ranked`, and `ttl` puts deadlines on top of any. LRU, touched tail first, is the default: on traces of
prompts it is the one to beat.
"""
