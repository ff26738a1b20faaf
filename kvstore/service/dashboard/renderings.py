"""Clients of a daemon that make different prompts of the same conversation: none finds another's pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.service.dashboard.models import RenderingGroup

if TYPE_CHECKING:
    from kvstore.service.daemon.session import ClientSession

MAX_RENDERINGS, MAX_NAMED = 20, 5


def renderings_of(sessions: Sequence[ClientSession]) -> list[RenderingGroup]:
    """Return the ways in which chats are rendered, of namespaces where there are several."""
    ways: dict[tuple[str, str], dict[str, list[str]]] = {}
    for session in sessions:
        if session.rendering:
            place = session.opened.tenant.name, session.opened.id
            ways.setdefault(place, {}).setdefault(session.rendering, []).append(session.client)
    return [
        RenderingGroup(
            tenant=tenant,
            namespace=namespace,
            rendering=rendering,
            clients=clients[:MAX_NAMED],
            num_clients=len(clients),
        )
        for (tenant, namespace), found in ways.items()
        if len(found) > 1
        for rendering, clients in found.items()
    ][:MAX_RENDERINGS]
