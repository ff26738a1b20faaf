"""The daemon's stores: one per tenant and namespace, each planning over a slab in shared memory.

A store is opened by the first client that says hello with its namespace, and stays open for those that follow. Host
and disk capacity are shared equally among the `service.max_namespaces` that a tenant may have, so that opening one more
never takes memory from one in use.

What a tier with a directory holds outlives the daemon: beside the pages lies `namespace.json`, from which `restore`
opens the same stores again before the first client comes.

In the daemon's event loop; opening and closing, which read directories and flush, happen in threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from kvstore import logs
from kvstore.build import open_store
from kvstore.codecs.loss import loss_of, marked
from kvstore.config.sections import Config
from kvstore.errors import ConfigError, KVStoreError, StoreClosed
from kvstore.layout import SLOT_ALIGNMENT, Layout
from kvstore.plan.flushing import Told
from kvstore.plan.journal import Journal
from kvstore.plan.records import Match, Request, RequestOptions
from kvstore.requests import RequestMaker
from kvstore.service.daemon.ledger import Ledger
from kvstore.service.daemon.tenants import Tenant
from kvstore.service.protocol.namespaces import (
    check_pair,
    layout_from_json,
    layout_to_json,
    namespace_from_json,
    namespace_to_json,
)
from kvstore.store import LocalStore
from kvstore.tiers.disk.private_files import open_private
from kvstore.tiers.host import SlabHandle
from kvstore.tiers.kind import TierKind
from kvstore.tiers.registry import kind_of
from radix.hashing import BlockHash, bind_hashes
from radix.namespace import Namespace

log = logging.getLogger(__name__)

T = TypeVar("T")

NAMESPACE_FILE = "namespace.json"
ID_DIGITS = 32  # of the namespace's root hash: 128 bits, as a directory name


class Watch:
    """Tells the event loop that a store has changed. `wake` is called by any thread; the rest is the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiters: dict[int, Callable[[], None]] = {}
        self._next = 0
        self._is_noted = False

    def wake(self) -> None:
        """Make the waiters look again. Under the store's lock, so it only leaves a note, and one at a time."""
        if self._waiters and not self._is_noted:
            self._is_noted = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._look)

    def add(self, waiter: Callable[[], None]) -> int:
        """Call `waiter` after every change until `remove`. The caller looks once itself, after this."""
        self._next += 1
        self._waiters[self._next] = waiter
        return self._next

    def remove(self, number: int) -> None:
        """Idempotent."""
        self._waiters.pop(number, None)

    def _look(self) -> None:
        self._is_noted = False
        for waiter in list(self._waiters.values()):
            waiter()


@dataclass(slots=True, eq=False)
class OpenStore:
    """A store in use.

    id:        names it in the API and on disk: the head of the namespace's root hash.
    namespace: as clients know it; the store's own has the tenant's salt in it.
    root:      what clients chain their block hashes from.
    """

    id: str
    tenant: Tenant
    layout: Layout
    namespace: Namespace
    store: LocalStore
    handle: SlabHandle
    watch: Watch
    journal: Journal
    root: BlockHash
    told: Told  # what flushes over HTTP have said
    request_ids: Iterator[int] = field(default_factory=lambda: count(1))
    ledger: Ledger = field(default_factory=Ledger)

    def new_request(
        self, keys: list[BlockHash], num_tokens: int, options: RequestOptions, holder: str = "http"
    ) -> Request:
        """A request under bound keys, numbered for the planner: clients count for themselves, and all from one.

        holder: names to operators on whose word its pages are kept.
        """
        return Request(next(self.request_ids), keys, num_tokens, options, holder=holder)

    async def wait_lookup(self, request: Request, timeout_s: float) -> Match:
        """Lookup, waiting for pending tiers without blocking the loop."""

        def look() -> Match | None:
            match = self.store.lookup(request)
            return None if match.pending else match

        return await self.wait_for(look, timeout_s) or self.store.lookup(request)

    async def ask(self, request: Request, timeout_s: float) -> None:
        """Ask shared tiers about a request, as far as they answer in time."""
        await self.wait_for(lambda: None if self.store.ask(request) else True, timeout_s)

    async def wait_for(self, look: Callable[[], T | None], timeout_s: float) -> T | None:
        """The result of `look` once it is not None; None after `timeout_s`. It is called after every change."""
        found = look()
        if found is not None or timeout_s <= 0:
            return found
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def again() -> None:
            try:
                found = look()
            except KVStoreError as error:
                if not future.done():
                    future.set_exception(error)
                return
            if found is not None and not future.done():
                future.set_result(found)

        waiter = self.watch.add(again)
        again()
        try:
            return await asyncio.wait_for(future, timeout_s)
        except asyncio.TimeoutError:
            return None
        finally:
            self.watch.remove(waiter)

    def bind(self, keys: Sequence[BlockHash]) -> list[BlockHash]:
        """The tenant's own names of blocks: no key a client could send names a page of another tenant."""
        if not self.tenant.salt:
            return list(keys)
        bound = bind_hashes(self.store.namespace.root(), keys)
        losses = [loss_of(key) for key in keys] if self.store.loss else ()
        return [marked((key,), loss)[0] for key, loss in zip(bound, losses, strict=True)] if any(losses) else bound


class Stores:
    """Opens, finds and closes the stores of a daemon. Its event loop only."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._open: dict[tuple[str, str], OpenStore] = {}
        self._opening: dict[tuple[str, str], asyncio.Task[OpenStore]] = {}
        self._is_closed = False

    async def open(self, tenant: Tenant, layout: Layout, namespace: Namespace) -> OpenStore:
        """The tenant's store of a namespace, opened now if it is not.

        Raises ConfigError, LayoutMismatch or StoreClosed.
        """
        check_pair(layout, namespace)
        place = (tenant.name, namespace_id(namespace))
        opened = self._open.get(place)
        if opened is not None:
            return opened
        if self._is_closed:
            raise StoreClosed("the daemon is closing")
        task = self._opening.get(place)
        if task is None:
            self._check_room(tenant)
            # Not the caller's own task: a client that gives up must not take the store from those who wait with it.
            task = self._opening[place] = asyncio.create_task(self._open_new(place, tenant, layout, namespace))
        return await asyncio.shield(task)

    async def restore(self, tenants: Sequence[Tenant]) -> int:
        """Open the stores whose pages lie on disk; returns how many. What cannot be opened is logged and left."""
        num_opened = 0
        for tenant in tenants:
            for directory in filter(Path.is_dir, self._directories(tenant)):
                for file in sorted(directory.glob(f"*/{NAMESPACE_FILE}")):
                    num_opened += await self._restore_one(tenant, file)
        return num_opened

    def find(self, tenant: Tenant, store_id: str) -> OpenStore | None:
        """The tenant's store of that id."""
        return self._open.get((tenant.name, store_id))

    def of(self, tenant: Tenant) -> list[OpenStore]:
        """All stores of a tenant, in the order in which they were opened."""
        return [opened for (name, _), opened in self._open.items() if name == tenant.name]

    def all(self) -> list[OpenStore]:
        """All stores of all tenants."""
        return list(self._open.values())

    async def close(self, timeout_s: float) -> None:
        """Flush and close every store, side by side, within about `timeout_s`. Idempotent."""
        self._is_closed = True
        for task in list(self._opening.values()):
            with contextlib.suppress(KVStoreError, OSError):
                await task
        opened = list(self._open.values())
        await asyncio.gather(*(asyncio.to_thread(one.store.close, timeout_s) for one in opened))

    async def _open_new(
        self, place: tuple[str, str], tenant: Tenant, layout: Layout, namespace: Namespace
    ) -> OpenStore:
        try:
            config = self.share(tenant, place[1])
            own = namespace if not tenant.salt else namespace.with_salt(_framed(namespace.salt, tenant.salt))
            store = await asyncio.to_thread(_open, config, layout, namespace, own)
            watch = Watch(asyncio.get_running_loop())
            store.listen(watch.wake)
            journal = Journal(time.time)
            store.keep_journal(journal)
            root = RequestMaker(namespace).root("")
            opened = OpenStore(
                place[1],
                tenant,
                layout,
                namespace,
                store,
                store.slots.handle,
                watch,
                journal,
                root,
                store.told_of_losses(),
            )
            self._open[place] = opened
            log.info(
                "opened %s of tenant %s: model %s, %d slots of %d bytes",
                place[1],
                tenant.name,
                logs.mask(namespace.model),
                opened.handle.num_slots,
                opened.handle.slot_bytes,
            )
            return opened
        finally:
            del self._opening[place]

    async def _restore_one(self, tenant: Tenant, file: Path) -> bool:
        try:
            value = json.loads(file.read_bytes())
            await self.open(tenant, layout_from_json(value["layout"]), namespace_from_json(value["namespace"]))
        except (KVStoreError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not opened: %s", file.parent, error)
            return False
        return True

    def _check_room(self, tenant: Tenant) -> None:
        most = self._config.service.max_namespaces
        taken = [place for place in (*self._open, *self._opening) if place[0] == tenant.name]
        if len(taken) >= most:
            raise ConfigError(
                f"service.max_namespaces is {most}, and as many are open: {', '.join(place[1] for place in taken)}; "
                "raise it and start the daemon again (host and disk capacity are shared equally among them)"
            )

    def share(self, tenant: Tenant, store_id: str, also: str = "") -> Config:
        """Return the configuration of one store: its share of the tenant's capacity, and its places on media.

        also: a tier that is off so far, to be attached.
        """
        config, most = self._config, self._config.service.max_namespaces
        host_bytes = min(tenant.host_bytes or config.host.capacity_bytes, config.host.capacity_bytes)
        tiers = config.tiers()
        if also and also not in [kind.name for kind, _ in tiers]:
            tiers.append((kind_of(also), config.tier(also)))
        return config.model_copy(
            update={
                "host": config.host.model_copy(update={"capacity_bytes": max(SLOT_ALIGNMENT, host_bytes // most)}),
                **{kind.name: _tier_share(kind, section, tenant, store_id, most) for kind, section in tiers},
            }
        )

    def _directories(self, tenant: Tenant) -> list[Path]:
        """The directory in which pages of a tenant outlive the daemon."""
        homes = [kind.home(section) for kind, section in self._config.tiers() if tenant.uses(kind.name)]
        return [home / tenant.name for home in homes if home is not None]


def _tier_share(kind: TierKind[Any], section: Any, tenant: Tenant, store_id: str, most: int) -> Any:
    if not tenant.uses(kind.name):
        return kind.off(section)
    update: dict[str, Any] = {}
    home = kind.home(section)
    if kind.directory is not None and home is not None:
        update[kind.directory] = home / tenant.name / store_id
    if kind.capacity is not None:
        sizes = [size for size in (tenant.bytes_in(kind.name), getattr(section, kind.capacity)) if size is not None]
        update[kind.capacity] = max(SLOT_ALIGNMENT, min(sizes) // most) if sizes else None
    return section.model_copy(update=update)


def namespace_id(namespace: Namespace) -> str:
    """The name of a namespace in the API and on disk."""
    return namespace.root().hex()[:ID_DIGITS]


def _open(config: Config, layout: Layout, namespace: Namespace, own: Namespace) -> LocalStore:
    store = open_store(
        config, layout, own, shared_name=f"kvstore-{namespace_id(namespace)}", is_guarded=config.service.isolate
    )
    for kind, section in config.tiers():
        home = kind.home(section)
        if home is not None:
            _write_namespace(home, layout, namespace)
    return store


def _write_namespace(directory: Path, layout: Layout, namespace: Namespace) -> None:
    """Write `namespace.json` whole or not at all. It holds salts, so it is its owner's alone."""
    value = {"layout": layout_to_json(layout), "namespace": namespace_to_json(namespace)}
    written = directory / (NAMESPACE_FILE + ".new")
    with open(open_private(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    written.replace(directory / NAMESPACE_FILE)


def _framed(own: str, tenant: str) -> str:
    # Another frame than RequestMaker's, so that no request salt of the local tenant can spell a tenant's name.
    return f"tenant {len(tenant)}:{tenant}{own}"
