"""A map in the order of insertion that never copies itself, for what a store keeps by the million.

A dict that is full is copied into a larger one, and one whose keys come and go is copied again and again: with a
million keys 80 to 440 ms in one call, and under the store's lock. The C extension's map grows and shrinks by one bucket
for each key, so that no call takes longer than its own keys (256 keys: 1 ms, most of it misses of the processor's
caches). Adding, moving and finding objects in the order in which they were made costs a third of an OrderedDict; of
keys in no order as much, adding up to 1.6 times. Memory: 56 bytes a key; a dict has 50 to 100, an OrderedDict 100 to
150.

It has what is used of OrderedDict here, which takes its place where the extension is not built: length, `in`,
subscripts, `get`, `pop`, `popitem`, `move_to_end`, `update` from one argument, `clear`, iteration from either end;
`items` and `values` give iterators. The garbage collector does not see it: no cycle of references may go through it.
"""

from __future__ import annotations

try:
    from radix._ordered import OrderedMap
except ImportError:  # not built on this machine
    from collections import OrderedDict as OrderedMap

__all__ = ["OrderedMap"]
