"""Our seat beside one llama-server: its slots, and the states of them that a store has.

    begin   look a prompt up, take a slot, and restore what is stored of it, if that is more than the slot has
    end     compare what the server has computed with what was restored, and store what is new
    give_up the client is gone, or the server has refused

A slot stays taken until its state is saved: nobody else's prompt may come in between. That happens after the answer is
out. The server may be another one from one request to the next: what it is is looked at again *after* a state went in
or out, so that there is no moment in which it could be started anew unseen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from connectors.base import ConnectorCounters
from connectors.llamacpp.slotfile import UnsliceableState
from connectors.llamacpp.states import RestoreFile, SlotStates, StoredPrefix, Tokens
from connectors.llamacpp.trust import WHY, Effect
from kvstore.base import RequestOptions
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.llamacpp.requests import Counts
from kvstore.llamacpp.served import Identifier, Served, close_store
from kvstore.llamacpp.server import LlamaServer, ServerGone, ServerRefused
from kvstore.llamacpp.slots import ANY_NUMBER, NOTHING, LlamaSlot
from kvstore.tiers import registry

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0


@dataclass(slots=True)
class LlamaTurn:
    """One request on one slot.

    tokens:      of its prompt; None if it goes past the store.
    least, most: leading tokens of it that the slot should have had, and may have had.
    may_reuse:   False if the slot has another's tokens, and could not be emptied: the server must not take of them.
    """

    served: Served
    slot: LlamaSlot
    tokens: Tokens | None
    options: RequestOptions
    found: StoredPrefix = field(default_factory=StoredPrefix)
    written: RestoreFile = field(default_factory=RestoreFile)
    least: int = 0
    most: int = 0
    may_reuse: bool = True
    restore_s: float = 0.0
    arrived: float = field(default_factory=monotonic)
    effect: Effect | None = None


class LlamaSeat:
    """The seat. Its event loop only.

    model:   place of the GGUF file, if not where the server says.
    weights: how they are identified, see `weights_name`.
    """

    def __init__(self, server: LlamaServer, config: Config, *, model: str | None = None, weights: str) -> None:
        self.server = server
        self.counters = ConnectorCounters()
        self.foreign = 0
        self.unsaved: dict[str, int] = {}
        self._config = config
        self._identifier = Identifier(server, config, self.counters, model=model, weights=weights)
        self._served: Served | None = None
        self._was_lost = False
        self._is_other = False
        self._renewing: asyncio.Task[None] | None = None
        self._ends: set[asyncio.Task[None]] = set()

    @property
    def served(self) -> Served:
        """The server. After `open`."""
        assert self._served is not None
        return self._served

    async def open(self) -> None:
        """Find out what the server is, and open its store. Raises ConfigError for what is none that can be used."""
        await asyncio.to_thread(self.server.remove_left)
        self._served = await self._identifier.identify()

    async def close(self) -> None:
        """Finish what is being saved, and close the store. Idempotent."""
        if self._ends:
            await asyncio.wait(self._ends, timeout=CLOSE_TIMEOUT_S)
        if self._served is not None:
            served, self._served = self._served, None
            await close_store(served)
            await asyncio.to_thread(self.server.remove_left)

    async def current(self) -> Served:
        """The server as it is known; identified anew if it was away."""
        if self._was_lost or self._is_other:
            # One for all requests, and not ended with the one that was first.
            if self._renewing is None or self._renewing.done():
                self._renewing = self._in_background(self._renew())
            await asyncio.shield(self._renewing)
        return self.served

    def is_lost(self) -> None:
        """The server could not be reached: whatever answers next is asked what it is."""
        self._was_lost = True

    async def begin(self, tokens: Tokens | None, options: RequestOptions) -> LlamaTurn:
        """Take a slot for a request, and restore what is stored of its prompt. tokens: None past the store.

        Raises ServerGone, and RequestError for options no request can have.
        """
        arrived = monotonic()
        served = await self.current()
        found = StoredPrefix() if tokens is None else await self._find(served, tokens, options)
        prompt = NOTHING if tokens is None else tokens
        block_size = self._config.store.block_size
        slot = await served.slots.take(prompt, options.tenant, found.num_tokens, block_size)
        turn = LlamaTurn(served, slot, tokens, options, found, arrived=arrived)
        try:
            if not slot.is_clean or slot.tenant != options.tenant:
                await self._erase(turn)
            turn.most = slot.most(prompt, options.tenant)
            turn.least = min(slot.common(prompt, options.tenant), max(0, len(prompt) - 1))
            if found.num_tokens > slot.common(prompt, options.tenant):
                await self._restore(turn)
        except BaseException:
            slot.spoil()
            await asyncio.shield(served.slots.give(slot))
            raise
        return turn

    async def held(self, tokens: Tokens, options: RequestOptions) -> tuple[int, int]:
        """The leading tokens of a prompt that need not be computed here, of the store or of a slot; and how many of
        them would come over a network."""
        served = await self.current()
        in_slots = max(slot.common(tokens, options.tenant) for slot in served.slots.slots)
        found = await self._find(served, tokens, options)
        if found.num_tokens <= in_slots:
            return in_slots, 0
        return found.num_tokens, registry.over_network(found.by_tier)

    def judge(self, turn: LlamaTurn, counts: Counts) -> None:
        """Compare what the server took and computed with what was restored; once for each turn."""
        if turn.effect is None and turn.written.num_tokens and turn.tokens is not None:
            turn.effect = turn.served.trust.judge(
                turn.written.num_tokens, len(turn.tokens), counts.cached, counts.computed
            )
            if turn.effect is Effect.FULL:
                self.counters.loads += 1
                self.counters.loaded_tokens += turn.written.num_tokens

    def end(self, turn: LlamaTurn, counts: Counts) -> None:
        """The server has answered. What is new is stored behind the caller's back; the slot is free after that."""
        self.judge(turn, counts)
        if counts.cached < turn.least and turn.served.states is not None and turn.served.trust.is_given:
            self._was_lost = True  # a server that was started anew has empty slots
        total = counts.cached + counts.computed + counts.generated
        if turn.tokens is None or total >= turn.served.context or counts.cached > turn.most:
            self.foreign += turn.tokens is not None and counts.cached > turn.most
            self.give_up(turn)
            return
        turn.slot.holds(turn.tokens, turn.options.tenant, counts.generated)
        self._in_background(self._keep(turn, total - 1, counts))

    def give_up(self, turn: LlamaTurn, *, was_cancelled: bool = False) -> None:
        """Give the slot back. was_cancelled: the prompt may be in it, and some of an answer."""
        if was_cancelled and turn.tokens is not None and turn.may_reuse:
            turn.slot.holds(turn.tokens, turn.options.tenant, ANY_NUMBER)
        else:
            turn.slot.spoil()
        self._in_background(self._give(turn))

    def stats(self) -> dict[str, Any]:
        """Numbers of the seat."""
        served = self.served
        why_not = served.why_not or ("" if served.trust.is_given else WHY)
        return {
            **self.counters.as_dict(),
            "restores": dict(served.trust.effects),
            "foreign_answers": self.foreign,
            "unsaved": dict(self.unsaved),
            "slots": len(served.slots.slots),
            "slots_free": served.slots.num_free,
            "waiting": served.slots.num_waiting,
            "off": why_not,
        }

    async def _find(self, served: Served, tokens: Tokens, options: RequestOptions) -> StoredPrefix:
        if served.states is None or not served.trust.is_given:
            return StoredPrefix()
        if self._config.service.url is None:
            found = served.states.find(tokens, options)  # here: a thread would cost a request that hits nothing
        else:
            # A daemon that hangs is found out by waiting: that must not hold up all other requests.
            found = await asyncio.to_thread(served.states.find, tokens, options)
        return await asyncio.to_thread(served.states.wait, found) if found.pending else found

    # ---- what the server is -----------------------------------------------------------------------------------------

    async def _renew(self) -> None:
        before = self.served
        try:
            if self._is_other or not await self._identifier.lives(before):
                log.warning("llama-server at %s may be another one: it is identified again", self.server.url)
                self._served = await self._identifier.identify(before)
        except ConfigError as error:
            raise ServerGone(str(error)) from error
        self._was_lost = self._is_other = False

    async def _is_same(self, served: Served) -> bool:
        """Whether the server is the one that was identified; if it is not, the next request finds out more."""
        try:
            is_same = await self._identifier.is_same(served)
        except ServerGone:
            # Or busy with a long prompt: one that is seen to live is not asked again for that.
            self._was_lost = self._was_lost or not served.life.is_seen
            return False
        if served is self._served and not is_same:
            self._is_other = True
        return is_same

    # ---- states in and out ------------------------------------------------------------------------------------------

    async def _erase(self, turn: LlamaTurn) -> None:
        try:
            await self.server.erase(turn.slot.id)
            turn.slot.holds(NOTHING, turn.options.tenant)
        except (ServerRefused, ServerGone, ValueError):
            turn.slot.spoil()
            if turn.slot.tenant != turn.options.tenant:
                turn.may_reuse, turn.slot.tenant = False, None

    async def _restore(self, turn: LlamaTurn) -> None:
        served, states, tokens = turn.served, turn.served.states, turn.tokens
        assert states is not None
        assert tokens is not None
        began = monotonic()
        if not await self._is_same(served):
            return
        path = self.server.new_file()
        try:
            written = await asyncio.to_thread(states.write, turn.found, tokens, path)
            if written.num_tokens <= turn.slot.common(tokens, turn.options.tenant):
                return
            turn.slot.spoil()
            turn.least = turn.most = 0  # where a restore fails, the server has emptied the slot
            await self.server.restore(turn.slot.id, path)
        except (ServerRefused, ServerGone, ValueError) as error:
            self.counters.load_failures += 1
            log.warning("a prompt is computed: %s", error)
            return
        finally:
            path.unlink(missing_ok=True)
        # Whoever has read the file: the process that was asked before may have ended since.
        if not (await self._identifier.lives(served) or await self._is_same(served)):
            await self._erase(turn)
            turn.may_reuse = turn.slot.is_clean
            return
        turn.slot.holds(tokens[: written.num_tokens], turn.options.tenant)
        turn.written, turn.most, turn.may_reuse = written, written.num_tokens, True
        turn.restore_s = monotonic() - began

    async def _keep(self, turn: LlamaTurn, num_tokens: int, counts: Counts) -> None:
        """Store the state of a slot, if it has a block that is not stored, and give the slot back."""
        try:
            served, states = turn.served, turn.served.states
            if states is None or not served.trust.is_given:
                return
            if counts.prefill_s:
                await asyncio.to_thread(states.observe, counts.computed, counts.prefill_s)
            block_size = self._config.store.block_size
            if num_tokens // block_size * block_size <= turn.found.stored_tokens:
                await asyncio.to_thread(states.finished, turn.found, turn.options)
            else:
                await self._save(turn, states, num_tokens + 1)
        except (UnsliceableState, ServerRefused, ServerGone, OSError, ValueError) as error:
            self.counters.save_failures += 1
            reason = type(error).__name__
            if reason not in self.unsaved:
                log.warning("the state of a slot is not stored: %s", error)
            self.unsaved[reason] = self.unsaved.get(reason, 0) + 1
            turn.slot.spoil()
        finally:
            await turn.served.slots.give(turn.slot)

    async def _save(self, turn: LlamaTurn, states: SlotStates, most_tokens: int) -> None:
        path = self.server.new_file()
        try:
            await self.server.save(turn.slot.id, path)
            if await self._is_same(turn.served):  # after it has written the file: another process writes other rows
                tokens = await asyncio.to_thread(states.save, path, turn.options, most_tokens)
                turn.slot.holds(tokens, turn.options.tenant)
            else:
                turn.slot.spoil()
        finally:
            path.unlink(missing_ok=True)

    async def _give(self, turn: LlamaTurn) -> None:
        await turn.served.slots.give(turn.slot)

    def _in_background(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(job)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        return task
