"""Cleaning up goes on after an error: a step that fails is logged, and the next one is taken."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.logs import where


@contextmanager
def goes_on(log: logging.Logger, told: str, *args: object) -> Iterator[None]:
    """Log an exception of the block, which is a fault of ours, instead of letting it end what comes after the block."""
    try:
        yield
    except Exception as error:
        log.error(f"{told}: %s", *args, where(error))  # not its text: that may hold what a client sent
