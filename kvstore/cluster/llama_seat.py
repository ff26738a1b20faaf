"""Our seat beside one llama-server: its slots, and the states of them that a store has.

    begin   look a prompt up, take a slot, and restore what is stored of it, if that is more than the slot has
    end     compare what the server has computed with what was restored, and store what is new
    give_up the client is gone, or the server has refused

A slot stays taken until its state is saved: nobody else's prompt may come in between. That happens after the answer is
out. The server may be another one from one request to the next: it is asked what it is before a state goes in or out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from connectors.base import ConnectorCounters
from connectors.llamacpp.identity import WITNESS_PROMPT, server_namespace, weights_name
from connectors.llamacpp.slotfile import SlotFile, UnsliceableState, read
from connectors.llamacpp.states import RestoreFile, SlotStates, StoredPrefix, Tokens, state_layout
from connectors.llamacpp.trust import WHY, Effect, Trust
from kvstore.base import RequestOptions
from kvstore.cluster.llama_requests import Counts
from kvstore.cluster.llama_server import LlamaServer, ServerGone, ServerRefused
from kvstore.cluster.llama_slots import ANY_NUMBER, NOTHING, LlamaSlot, LlamaSlots
from kvstore.config.sections import Config
from kvstore.errors import ConfigError, KVStoreError

log = logging.getLogger(__name__)

WITNESS_TIMEOUT_S = 600.0  # a slot of a busy server has to come free
CLOSE_TIMEOUT_S = 30.0
NEW_ENOUGH = "use a llama-server of this year"


@dataclass(slots=True)
class Served:
    """One server as it was identified. why_not: why no state is stored or restored; "" if they are."""

    props: Mapping[str, Any]
    adapters: list[dict[str, Any]]
    slots: LlamaSlots
    context: int
    states: SlotStates | None
    why_not: str = ""
    trust: Trust = field(default_factory=Trust)


@dataclass(slots=True)
class LlamaTurn:
    """One request on one slot.

    tokens: of its prompt; None if it goes past the store.
    most:   leading tokens of it that the slot may have had.
    """

    served: Served
    slot: LlamaSlot
    tokens: Tokens | None
    options: RequestOptions
    found: StoredPrefix = field(default_factory=StoredPrefix)
    written: RestoreFile = field(default_factory=RestoreFile)
    most: int = 0
    restore_s: float = 0.0
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
        self._model = model
        self._weights = weights
        self._served: Served | None = None
        self._is_stale = False
        self._opening = asyncio.Lock()
        self._ends: set[asyncio.Task[None]] = set()

    @property
    def served(self) -> Served:
        """The server. After `open`."""
        assert self._served is not None
        return self._served

    async def open(self) -> None:
        """Find out what the server is, and open its store. Raises ConfigError for what is none that can be used."""
        self._served = await self._identify()

    async def close(self) -> None:
        """Finish what is being saved, and close the store. Idempotent."""
        if self._ends:
            await asyncio.wait(self._ends, timeout=CLOSE_TIMEOUT_S)
        if self._served is not None:
            served, self._served = self._served, None
            await self._close_store(served)

    async def current(self) -> Served:
        """The server as it is known; identified anew if it was away."""
        if self._is_stale:
            await self._renew()
        return self.served

    def is_lost(self) -> None:
        """The server could not be reached: whatever answers next is asked what it is."""
        self._is_stale = True

    async def begin(self, tokens: Tokens | None, options: RequestOptions) -> LlamaTurn:
        """Take a slot for a request, and restore what is stored of its prompt. tokens: None past the store.

        Raises ServerGone, and RequestError for options no request can have.
        """
        served = await self.current()
        found = StoredPrefix()
        if tokens is not None and served.states is not None and served.trust.is_given:
            found = served.states.find(tokens, options)  # here: a thread would cost a request that hits nothing
            if found.pending:
                found = await asyncio.to_thread(served.states.wait, found)
        prompt = NOTHING if tokens is None else tokens
        block_size = self._config.store.block_size
        slot = await served.slots.take(prompt, options.tenant, found.num_tokens, block_size)
        turn = LlamaTurn(served, slot, tokens, options, found)
        try:
            if not slot.is_clean or slot.tenant != options.tenant:
                await self._erase(turn)
            turn.most = slot.most(prompt, options.tenant)
            if found.num_tokens > slot.common(prompt, options.tenant):
                await self._restore(turn)
        except BaseException:
            slot.spoil()
            await asyncio.shield(served.slots.give(slot))
            raise
        return turn

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
        total = counts.cached + counts.computed + counts.generated
        if turn.tokens is None or total >= turn.served.context or counts.cached > turn.most:
            self.foreign += turn.tokens is not None and counts.cached > turn.most
            self.give_up(turn)
            return
        turn.slot.holds(turn.tokens, turn.options.tenant, counts.generated)
        self._in_background(self._keep(turn, total - 1, counts))

    def give_up(self, turn: LlamaTurn, *, was_cancelled: bool = False) -> None:
        """Give the slot back. was_cancelled: the prompt may be in it, and some of an answer."""
        if was_cancelled and turn.tokens is not None:
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

    # ---- what the server is -----------------------------------------------------------------------------------------

    async def _identify(self) -> Served:
        props = await self.server.props()
        adapters = await self.server.adapters()
        slots = LlamaSlots(max(1, props["total_slots"]))
        context = int((props.get("default_generation_settings") or {}).get("n_ctx") or ANY_NUMBER)
        try:
            witness = await self._witness(len(slots.slots) - 1)
        except UnsliceableState as error:
            log.warning("nothing is stored: %s", error)
            return Served(props, adapters, slots, context, None, str(error))
        config = self._config
        layout = state_layout(witness.shape, config.store.block_size)
        path = self._model or props.get("model_path")
        namespace = await asyncio.to_thread(self._namespace, props, adapters, layout, witness, path)
        states = await asyncio.to_thread(SlotStates.open, config, layout, namespace, witness.shape, self.counters)
        return Served(props, adapters, slots, context, states)

    def _namespace(self, props: Any, adapters: Any, layout: Any, witness: SlotFile, path: str | None) -> Any:
        weights = weights_name(path, self._weights)
        return server_namespace(props, adapters, layout, witness, weights=weights, hash_name=self._config.store.hash)

    async def _witness(self, slot: int) -> SlotFile:
        """The state that the server makes of a fixed prompt. Raises ConfigError if it cannot be had."""
        body = {"prompt": WITNESS_PROMPT, "n_predict": 1, "temperature": 0, "id_slot": slot, "cache_prompt": False}
        path = self.server.new_file()
        try:
            answer = await self.server.call("POST", "/completion", body, WITNESS_TIMEOUT_S)
            timings = answer.get("timings") if isinstance(answer, dict) else None
            if not isinstance(timings, dict) or "cache_n" not in timings or "prompt_n" not in timings:
                raise ConfigError(
                    f"llama-server {self.server.url} does not tell timings.cache_n and prompt_n, so that no restore "
                    f"could be believed; {NEW_ENOUGH}"
                )
            await self.server.save(slot, path)
            if not path.is_file():
                raise ConfigError(
                    f"llama-server has saved a slot, and not into {self.server.folder}: name the directory that it was "
                    "given as --slot-save-path (--slots DIR), which has to be on this machine"
                )
            witness = await asyncio.to_thread(_read_whole, path)
            await self.server.erase(slot)
            return witness
        except ServerRefused as error:
            raise ConfigError(_no_slots(error)) from error
        except ValueError as error:
            if isinstance(error, KVStoreError):
                raise
            raise ConfigError(f"{self.server.url} does not answer in JSON; {NEW_ENOUGH}") from error
        finally:
            path.unlink(missing_ok=True)

    async def _renew(self) -> None:
        async with self._opening:
            if not self._is_stale:
                return
            try:
                if (
                    await self.server.props() != self.served.props
                    or await self.server.adapters() != self.served.adapters
                ):
                    log.warning("another llama-server is at %s: it is identified anew", self.server.url)
                    before, self._served = self.served, await self._identify()
                    await self._close_store(before)
                else:
                    self.served.slots.spoil()
            except ConfigError as error:
                raise ServerGone(str(error)) from error
            self._is_stale = False

    async def _is_same(self, served: Served) -> bool:
        """Whether the server is the one that was identified; if it is not, the next request finds out more."""
        try:
            same = await self.server.props() == served.props and await self.server.adapters() == served.adapters
        except (KVStoreError, ValueError):
            same = False
        self._is_stale = self._is_stale or not same
        return same

    async def _close_store(self, served: Served) -> None:
        if served.states is not None:
            await asyncio.to_thread(served.states.store.close)

    # ---- states in and out ------------------------------------------------------------------------------------------

    async def _erase(self, turn: LlamaTurn) -> None:
        try:
            await self.server.erase(turn.slot.id)
            turn.slot.holds(NOTHING, turn.options.tenant)
        except (ServerRefused, ValueError):
            turn.slot.spoil()

    async def _restore(self, turn: LlamaTurn) -> None:
        states, tokens = turn.served.states, turn.tokens
        assert states is not None
        assert tokens is not None
        began = monotonic()
        if not await self._is_same(turn.served):
            return
        path = self.server.new_file()
        try:
            written = await asyncio.to_thread(states.write, turn.found, tokens, path)
            if written.num_tokens <= turn.slot.common(tokens, turn.options.tenant):
                return
            turn.slot.spoil()
            await self.server.restore(turn.slot.id, path)
        except (ServerRefused, ValueError) as error:
            self.counters.load_failures += 1
            log.warning("a prompt is computed: %s", error)
            turn.most = 0  # the server has emptied the slot
            return
        finally:
            path.unlink(missing_ok=True)
        turn.slot.holds(tokens[: written.num_tokens], turn.options.tenant)
        turn.written, turn.most = written, written.num_tokens
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
            elif await self._is_same(served):
                turn.slot.holds(await self._save(turn, states), turn.options.tenant)
        except (UnsliceableState, ServerRefused, ServerGone, OSError, ValueError) as error:
            self.counters.save_failures += 1
            reason = type(error).__name__
            if reason not in self.unsaved:
                log.warning("the state of a slot is not stored: %s", error)
            self.unsaved[reason] = self.unsaved.get(reason, 0) + 1
            turn.slot.spoil()
        finally:
            await turn.served.slots.give(turn.slot)

    async def _save(self, turn: LlamaTurn, states: SlotStates) -> Tokens:
        path = self.server.new_file()
        try:
            await self.server.save(turn.slot.id, path)
            return await asyncio.to_thread(states.save, path, turn.options)
        finally:
            path.unlink(missing_ok=True)

    async def _give(self, turn: LlamaTurn) -> None:
        await turn.served.slots.give(turn.slot)

    def _in_background(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(job)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)


def _read_whole(path: Path) -> SlotFile:
    return read(np.frombuffer(path.read_bytes(), np.uint8))


def _no_slots(error: ServerRefused) -> str:
    """What to do about a server that does not save slots."""
    if error.status in (404, 501) or "slot" in error.message.lower():
        return (
            f"{error}; start llama-server with --slot-save-path DIR (a directory in memory, such as /dev/shm/slots), "
            "and without --no-slots"
        )
    return f"{error}; {NEW_ENOUGH}"
