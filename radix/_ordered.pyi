"""Types of the optional C extension; `radix.ordered` says what it is for."""

from collections import OrderedDict as OrderedMap

__all__ = ["OrderedMap"]
