"""Devices that are slow, or fail, as a test tells them."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

from kvstore.devices.base import CopyEvent, PageTable
from kvstore.devices.cpu import CpuDevice

DELAY_S = 0.002


class MoodyDevice(CpuDevice):
    """Copies into the pools that can be held, delayed at random, or made to fail.

    delays: of each copy, at random; None for none. fail_in: copies until one raises; -1 for never.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.fail_in = -1
        self.num_copies = 0
        self._random = None if seed is None else random.Random(seed)
        self._go = threading.Event()
        self._go.set()
        self._pause = threading.Event()

    def hold(self) -> None:
        """Let no copy begin."""
        self._go.clear()

    def go_on(self) -> None:
        """Let them begin."""
        self._go.set()

    def copy_in(self, table: PageTable, page_ids: Sequence[int], slots: Sequence[Any]) -> CopyEvent:
        """Copy, in its own time."""
        self._go.wait()
        self.num_copies += 1
        if self._random is not None:
            self._pause.wait(self._random.random() * DELAY_S)
        if self.fail_in >= 0:
            self.fail_in -= 1
            if self.fail_in < 0:
                raise RuntimeError("the copy failed, as the test wants it")
        return super().copy_in(table, page_ids, slots)
