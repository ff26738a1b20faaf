"""Threads that read and write pages of one tier without a pause, and judge every answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvstore.errors import TierUnavailable
from kvstore.page import PageKey, PageMeta
from kvstore.testing.pages import filled, payload, slots
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.waiting import wait_until


@dataclass
class Load:
    """What was seen. Any thread.

    hits, misses: by key.
    wrong:        pages that were said to be there and were not theirs.
    errors:       of calls, in words.
    longest_s:    of a call.
    """

    hits: Counter[PageKey] = field(default_factory=Counter)
    misses: Counter[PageKey] = field(default_factory=Counter)
    wrong: list[PageKey] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def await_hits(self, keys: Sequence[PageKey], what: str) -> None:
        """Wait until each of `keys` has been read once more."""
        before = self.hits.copy()
        wait_until(lambda: all(self.hits[key] > before[key] for key in keys), what)


@contextmanager
def under_load(tier: RedisTier, keys: Sequence[PageKey], num_bytes: int, timeout_s: float) -> Iterator[Load]:
    """Read all pages again and again in one thread, and write what is missing in another, while the block runs."""
    load = Load()
    ended = threading.Event()
    rights = {key: memoryview(payload(key, num_bytes)) for key in keys}
    metas = [PageMeta(num_bytes)] * len(keys)
    written = filled(keys, num_bytes)

    def call(verb: str) -> None:
        started = time.monotonic()
        views = written if verb == "write" else slots(len(keys), num_bytes)
        try:
            if verb == "write":
                tier.write_from(keys, views, metas, timeout_s=timeout_s)
            else:
                found = tier.read_into(keys, views, metas, timeout_s=timeout_s)
                for key, is_there, view in zip(keys, found, views, strict=True):
                    (load.hits if is_there else load.misses)[key] += 1
                    if is_there and view != rights[key]:
                        load.wrong.append(key)
        except TierUnavailable as error:
            load.errors.append(str(error))
            ended.wait(0.02)
        load.longest_s = max(load.longest_s, time.monotonic() - started)

    def go_on(verb: str) -> None:
        while not ended.is_set():
            call(verb)

    call("write")
    threads = [threading.Thread(target=go_on, args=(verb,)) for verb in ("read", "write")]
    for thread in threads:
        thread.start()
    try:
        load.await_hits(keys, "all pages were read once")
        yield load
    finally:
        ended.set()
        for thread in threads:
            thread.join()
