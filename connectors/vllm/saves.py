"""Saves of the scheduler's half: blocks that a step fills get slots, and are published when every rank has copied them.

Slots are given before the step. The blocks are held in vLLM's block pool meanwhile (a reference, as if another request
used them), so neither the end of the request nor a preemption has to wait for a save, and the engine never waits for
one: where no slot is free, the page is skipped and counted.

The scheduler's thread, but for `saved`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from connectors.answers import SavedAnswers
from connectors.vllm.config import ConnectorConfig
from connectors.vllm.layout import EngineLayout
from connectors.vllm.messages import PageCopies, SaveJob
from connectors.vllm.requests import NEVER, Requests, Tracked
from kvstore.base import KVStore, SaveLease
from kvstore.prefix.answers import AnswerVerdict

log = logging.getLogger("vllm.kvstore")  # below vLLM's logger, so that its handlers and level apply

COUNTERS = ("saved_pages", "skipped_pages", "unsaved_pages", "save_failures")


@dataclass(slots=True)
class Saving:
    """A save that ranks are copying: its lease, which of its pages have a block, the blocks held for it."""

    lease: SaveLease
    request: str
    filled: list[bool]
    held: list[Any]
    is_good: bool = True


class SchedulerSaves:
    """Saves of one engine."""

    def __init__(
        self,
        store: KVStore,
        engine: EngineLayout,
        config: ConnectorConfig,
        requests: Requests,
        counters: dict[str, float],
        world: int,
        answers: SavedAnswers,
    ) -> None:
        self.pool: Any = None  # vLLM's block pool
        self._store = store
        self._engine = engine
        self._block_size = engine.layout.block_size
        self._answers = answers
        self._requests = requests
        self._counters = counters
        self._world = world
        self._suspects: set[str] = set()
        self._under_way: dict[int, Saving] = {}
        self._jobs: list[SaveJob] = []

    def plan(self, name: str, tracked: Tracked, num_tokens: int, block_ids: Callable[[str], Any]) -> None:
        """Save the blocks that a step fills which computes `num_tokens` of the request. Never raises."""
        if tracked.is_mixed:
            return
        if self._suspects:
            tracked.num_saved = NEVER
            return
        try:
            self._plan(name, tracked, num_tokens, block_ids)
        except Exception:  # a save that cannot be planned must not keep the loads of this step from the workers
            self._counters["save_failures"] += 1
            log.exception("kvstore: a save of request %s could not be planned", name)
            tracked.num_saved = NEVER

    def take_jobs(self) -> list[SaveJob]:
        """The copies for this step."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def has(self, lease_id: int) -> bool:
        """True while a save is being copied."""
        return lease_id in self._under_way

    def saved(self, lease_id: int, ok: bool) -> None:
        """A save of the only rank ended. Any thread; publishes at once what `ended` would at the next step."""
        saving = self._under_way.get(lease_id)
        if saving is not None and ok and self._world == 1 and saving.is_good:
            self._store.complete(saving.lease, filled=saving.filled)

    def ended(self, lease_id: int, is_good: bool) -> None:
        """Every rank has copied a save, or failed to."""
        saving = self._under_way.pop(lease_id)
        self.pool.free_blocks(reversed(saving.held))
        if is_good and saving.is_good:
            self._store.complete(saving.lease, filled=saving.filled)
            self._counters["saved_pages"] += sum(saving.filled)
        else:
            self._store.release(saving.lease)
            self._counters["save_failures"] += 1

    def spoil(self) -> None:
        """Publish nothing of what is being copied."""
        for saving in self._under_way.values():
            saving.is_good = False

    def distrust(self) -> None:
        """A load failed inside a step: save nothing of who is there, nor of who comes before they end.

        Who shares its blocks has computed over what is missing, and may do so again while vLLM computes them.
        """
        self.spoil()
        self._suspects = {tracked.engine.request_id for tracked in self._requests}

    def request_finished(self, name: str, tracked: Tracked | None) -> None:
        """A request is over."""
        self._suspects.discard(name)
        if tracked is not None and tracked.judge is not None and tracked.judge.verdict is not AnswerVerdict.SAVE:
            num_blocks = len(tracked.engine.block_hashes) // self._engine.hashes_per_block
            num_left = max(0, num_blocks - tracked.judged // self._block_size)
            self._counters["unsaved_pages"] += num_left * len(self._engine.layout.groups)

    def __len__(self) -> int:
        return len(self._under_way)

    def _plan(self, name: str, tracked: Tracked, num_tokens: int, block_ids: Callable[[str], Any]) -> None:
        request = tracked.engine
        end = (request.num_computed_tokens + num_tokens) // self._block_size
        end = min(end, len(request.block_hashes) // self._engine.hashes_per_block)
        end_of_prompt = request.num_prompt_tokens // self._block_size
        if end > end_of_prompt and end > tracked.num_saved and not self._saves_answer(tracked):
            end = end_of_prompt
        if end <= tracked.num_saved:
            return
        ids = block_ids(name)
        if ids is None:
            return
        self._requests.extend(tracked)
        first, tracked.num_saved = tracked.num_saved, end
        lease = self._store.prepare_save(tracked.store, first, end - first)
        self._counters["skipped_pages"] += lease.skipped
        copies: dict[int, tuple[list[int], list[int]]] = {}
        filled: list[bool] = []
        pages = lease.pages
        for index, group, slot in zip(pages.blocks.tolist(), pages.groups.tolist(), pages.slots.tolist(), strict=True):
            row = ids[self._engine.group_ids[group]]
            block = row[index] if index < len(row) else 0
            filled.append(block != 0)  # block 0 is vLLM's null block: outside of the window
            if block:
                slots, blocks = copies.setdefault(group, ([], []))
                slots.append(slot)
                blocks.append(block)
        if not copies or self.pool is None:
            self._store.release(lease)
            return
        held = [self.pool.blocks[block] for _, blocks in copies.values() for block in blocks]
        self.pool.touch(held)
        self._under_way[lease.id] = Saving(lease, name, filled, held)
        self._jobs.append(
            SaveJob(lease.id, name, tuple(PageCopies(group, tuple(s), tuple(b)) for group, (s, b) in copies.items()))
        )

    def _saves_answer(self, tracked: Tracked) -> bool:
        """Whether what a request has generated is saved. While that is open its blocks wait where they are."""
        request = tracked.engine
        if tracked.judged != request.num_prompt_tokens:  # new, or a streaming session that goes on
            tracked.judged = tracked.num_heard = request.num_prompt_tokens
            tracked.judge = self._answers.judge(getattr(request, "prompt_token_ids", None) or ())
        judge = tracked.judge
        if judge is not None and judge.verdict is AnswerVerdict.OPEN:
            judge.add(request.all_token_ids[tracked.num_heard :])
            tracked.num_heard = len(request.all_token_ids)
        return judge is not None and judge.verdict is AnswerVerdict.SAVE
