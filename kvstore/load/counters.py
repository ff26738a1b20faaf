"""Hits by tier as servers count them, for those that do not tell them of each request.

A replica of any engine counts them at its `/metrics`. What they say after a run less what they said before it is of
that run and of whoever else used them meanwhile.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

_LINE = re.compile(r'^kvstore_replica_hit_tokens_total\{tier="(\w+)"\} ([\d.e+]+)$', re.MULTILINE)


def read_hits(texts: list[str]) -> Counter[str]:
    """The tokens by tier in some servers' metrics, together."""
    hits: Counter[str] = Counter()
    for text in texts:
        for tier, tokens in _LINE.findall(text):
            hits[tier] += int(float(tokens))
    return hits


def gained(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """What was added, by tier; a server that was started anew in between counts from 0."""
    return {tier: tokens - before.get(tier, 0) for tier, tokens in after.items() if tokens >= before.get(tier, 0)}
