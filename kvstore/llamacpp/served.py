"""What llama-server is: asked once, and looked at again before its states are believed.

identify   settings, adapters, the state that it makes of a fixed prompt, its file and process; and its store
is_same    whether all that can be asked quickly is as it was
lives      whether it is certainly the same process
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from connectors.base import ConnectorCounters
from connectors.llamacpp.identity import WITNESS_PROMPT, StateMaker, state_maker, weights_name
from connectors.llamacpp.slotfile import SlotFile, UnsliceableState, read
from connectors.llamacpp.states import SlotStates
from connectors.llamacpp.trust import Trust
from kvstore.config.sections import Config
from kvstore.errors import ConfigError, KVStoreError
from kvstore.llamacpp.life import Life, life_of
from kvstore.llamacpp.server import LlamaServer, ServerRefused
from kvstore.llamacpp.slots import ANY_NUMBER, LlamaSlots

log = logging.getLogger(__name__)

WITNESS_TIMEOUT_S = 600.0  # a slot of a busy server has to come free
MIN_WITNESS_TOKENS = 8  # the row of the first token does not depend on rope settings
NEW_ENOUGH = "use a llama-server of this year"


@dataclass(slots=True)
class Served:
    """One server as it was identified. why_not: why no state is stored or restored; "" if they are."""

    props: Mapping[str, Any]
    adapters: list[dict[str, Any]]
    slots: LlamaSlots
    context: int
    life: Life
    maker: StateMaker | None = None
    states: SlotStates | None = None
    why_not: str = ""
    trust: Trust = field(default_factory=Trust)


class Identifier:
    """Identifies one server. Its event loop only.

    model:   place of the GGUF file, if not where the server says.
    weights: how they are identified, see `weights_name`.
    """

    def __init__(
        self, server: LlamaServer, config: Config, counters: ConnectorCounters, *, model: str | None, weights: str
    ) -> None:
        self._server = server
        self._config = config
        self._counters = counters
        self._model = model
        self._weights = weights

    async def identify(self, before: Served | None = None) -> Served:
        """Find out what the server is, and open its store; that of `before`, which it replaces, is kept or closed.

        Raises ConfigError for a server that is none, and without `before` for one whose states cannot be stored.
        """
        sockets = (await self._life({})).sockets  # before anything else is asked: what changes later is seen later
        props = await self._server.props()
        life = Life(sockets, (await self._life(props)).file)
        adapters = await self._server.adapters()
        context = int((props.get("default_generation_settings") or {}).get("n_ctx") or ANY_NUMBER)
        served = Served(props, adapters, LlamaSlots(max(1, props["total_slots"])), context, life)
        try:
            witness = await self._witness(len(served.slots.slots) - 1)
            served.maker = await asyncio.to_thread(self._maker, served, witness)
        except (UnsliceableState, ConfigError) as error:
            if before is None and isinstance(error, ConfigError):
                raise
            log.warning("nothing is stored: %s", error)
            served.why_not = str(error)
        if before is not None and before.states is not None:
            if served.maker is not None and before.maker == served.maker:
                served.states = before.states
                return served
            before.maker = None  # whatever becomes of this one, that store is not used again
            await close_store(before)  # before another one is opened, which may have the same directory
        if served.maker is None:
            return served
        try:
            served.states = await asyncio.to_thread(SlotStates.open, self._config, served.maker, self._counters)
        except KVStoreError as error:
            if before is None:
                raise
            log.warning("nothing is stored: %s", error)
            served.why_not = str(error)
        return served

    async def lives(self, served: Served) -> bool:
        """Whether it is certainly the process that was identified."""
        return served.life.is_seen and await self._life(served.props) == served.life

    async def is_same(self, served: Served) -> bool:
        """Whether the server is still the one that was identified, as far as can be told. Raises ServerGone."""
        try:
            return (
                await self._life(served.props) == served.life
                and await self._server.props() == served.props
                and await self._server.adapters() == served.adapters
            )
        except (ConfigError, ServerRefused, ValueError):
            return False

    async def _life(self, props: Mapping[str, Any]) -> Life:
        return await asyncio.to_thread(life_of, self._server.url, self._model or props.get("model_path"))

    def _maker(self, served: Served, witness: SlotFile) -> StateMaker:
        store = self._config.store
        weights = weights_name(self._model or served.props.get("model_path"), self._weights)
        return state_maker(
            served.props, served.adapters, witness, block_size=store.block_size, weights=weights, hash_name=store.hash
        )

    async def _witness(self, slot: int) -> SlotFile:
        """The state that the server makes of a fixed prompt. Raises ConfigError if it cannot be had."""
        body = {"prompt": WITNESS_PROMPT, "n_predict": 1, "temperature": 0, "id_slot": slot, "cache_prompt": False}
        path = self._server.new_file()
        try:
            answer = await self._server.call("POST", "/completion", body, WITNESS_TIMEOUT_S)
            timings = answer.get("timings") if isinstance(answer, dict) else None
            if not isinstance(timings, dict) or "cache_n" not in timings or "prompt_n" not in timings:
                raise ConfigError(
                    f"llama-server {self._server.url} does not tell timings.cache_n and prompt_n, so that no restore "
                    f"could be believed; {NEW_ENOUGH}"
                )
            await self._server.save(slot, path)
            if not path.is_file():
                raise ConfigError(
                    f"llama-server has saved a slot, and not into {self._server.folder}: name the directory that it "
                    "was given as --slot-save-path (--slots DIR), which has to be on this machine"
                )
            witness = await asyncio.to_thread(_read_whole, path)
            await self._server.erase(slot)
            if len(witness.tokens) < MIN_WITNESS_TOKENS:
                raise UnsliceableState(
                    f"llama-server has saved {len(witness.tokens)} tokens of a prompt of {timings['prompt_n']}, so its "
                    "settings cannot be told from its rows; was another client using it? Start the front again then"
                )
            return witness
        except ServerRefused as error:
            raise ConfigError(_no_slots(error)) from error
        except ValueError as error:
            if isinstance(error, KVStoreError):
                raise
            raise ConfigError(f"{self._server.url} does not answer in JSON; {NEW_ENOUGH}") from error
        finally:
            path.unlink(missing_ok=True)


async def close_store(served: Served) -> None:
    """Close the store of a server, if it has one. Idempotent."""
    if served.states is not None:
        await asyncio.to_thread(served.states.store.close)


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
