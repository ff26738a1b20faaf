"""The HTTP API's operations on clients: who is attached or moves pages, what each holds for how long, and its end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvstore.service.daemon.session import ClientSession
from kvstore.service.daemon.state import DaemonState
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.daemon.transfers import PageTransfer
from kvstore.service.http.answers import ClientAnswer, ClientsAnswer, KeptAnswer
from kvstore.service.http.problems import Problem
from kvstore.service.http.routes import ApiCall, Route


def kept_in(stores: Sequence[OpenStore]) -> list[KeptAnswer]:
    """Return what pins and promises keep in stores, by holder."""
    return [
        KeptAnswer(
            holder=one.holder,
            tenant=opened.tenant.name,
            namespace=opened.id,
            salt=one.payer,
            slots=one.num_pages,
            num_bytes=one.num_pages * opened.handle.slot_bytes,
            until=one.until,
        )
        for opened in stores
        for one in opened.store.admin.kept()
    ]


class ClientsApi:
    """Operations on clients. The daemon's event loop only."""

    def __init__(self, state: DaemonState) -> None:
        self._state = state

    def routes(self) -> list[Route]:
        """Their part of the table."""
        return [
            Route("GET", "/v1/clients", self.clients, "Who is attached, and what they hold.", answer=ClientsAnswer),
            Route("POST", "/v1/clients/{client}/disconnect", self.disconnect, "End a transfer of pages.",
                  answer=ClientsAnswer, needs_operator=True, errors=(404, 409)),
        ]  # fmt: skip

    async def clients(self, call: ApiCall) -> ClientsAnswer:
        sessions = self._state.sessions.values()
        mine = [one for one in sessions if call.tenant.is_operator or one.opened.tenant == call.tenant]
        stores = self._state.stores
        kept = kept_in(stores.all() if call.tenant.is_operator else stores.of(call.tenant))
        transfers = [
            one for one in self._state.transfers if call.tenant.is_operator or one.opened.tenant == call.tenant
        ]
        clients = [*(self._client(session, kept) for session in mine), *map(self._transfer, transfers)]
        return ClientsAnswer(clients=clients, kept=kept)

    async def disconnect(self, call: ApiCall) -> ClientsAnswer:
        number = call.request.match_info["client"]
        session, transfer = self._state.clients.find(number), self._state.transfers.find(number)
        if transfer is not None:
            transfer.end()
            return await self.clients(call)
        if session is None:
            raise Problem(404, "there is no such client", field="client")
        # Whatever we do, it has the slab mapped, and its slots must go to nobody else while it may write there.
        detail = f"it shares this machine's memory: end its process, {session.pid}, and its leases are released"
        raise Problem(409, "a client on this machine cannot be disconnected", detail, "client")

    # ---- private ----------------------------------------------------------------------------------------------------

    def _client(self, session: ClientSession, kept: list[KeptAnswer]) -> ClientAnswer:
        now, leases = time.monotonic(), session.leases.values()
        own = next((one for one in kept if one.holder == session.holder and one.namespace == session.opened.id), None)
        return ClientAnswer(
            id=session.number,
            client=session.client,
            tenant=session.opened.tenant.name,
            namespace=session.opened.id,
            is_remote=False,
            pid=session.pid,
            connections=len(self._state.clients.connections(session)),
            ranks=len(session.anchors) - (not session.is_orphan),
            attached_s=now - session.began_at,
            idle_s=now - session.heard_at,
            leases=len(leases),
            slots=sum(len(held.lease.pages) for held in leases),
            oldest_lease_s=max((now - held.granted_at for held in leases), default=None),
            overdue_leases=len(session.overdue(now - self._state.config.service.lease_max_s)),
            is_alone=session.is_orphan,
            kept_slots=0 if own is None else own.slots,
            kept_until=None if own is None else own.until,
            staging_slots=0 if session.staged is None else session.staged.num_slots,
            staging_free=0 if session.staged is None else session.staged.num_free,
        )

    def _transfer(self, transfer: PageTransfer) -> ClientAnswer:
        now, oldest = time.monotonic(), transfer.oldest_at
        leases = [lease for lease, _ in transfer.leases.values()]
        return ClientAnswer(
            id=transfer.number,
            client=transfer.name,
            tenant=transfer.opened.tenant.name,
            namespace=transfer.opened.id,
            is_remote=True,
            pid=None,
            connections=1,
            ranks=0,
            attached_s=now - transfer.began_at,
            idle_s=now - transfer.moved_at,
            leases=len(leases),
            slots=sum(len(lease.pages) for lease in leases),
            oldest_lease_s=None if oldest is None else now - oldest,
            overdue_leases=0,
            is_alone=False,
            kept_slots=0,
            kept_until=None,
        )
