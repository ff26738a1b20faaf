"""What a channel asks of its connection."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from kvstore.service.daemon.connection import Channel
from kvstore.service.daemon.greeting import Greeting
from kvstore.service.daemon.tenants import Tenant


class NoHost:
    async def hello(self, channel: Channel, message: dict[str, Any]) -> Greeting:
        raise AssertionError("nobody says hello here")

    def attach(self, channel: Channel, message: dict[str, Any]) -> Greeting | None:
        return None

    def lost(self, channel: Channel) -> None:
        pass

    def may_hold(self, channel: Channel, num_bytes: int) -> bool:
        return True


async def test_a_client_whose_machine_vanishes_is_noticed_by_the_kernel() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connected = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
    with accepted:
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: Channel(NoHost(), "test", tenant=Tenant("local"), is_local=False), sock=connected
        )
        try:
            options = transport.get_extra_info("socket")
            assert options.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            silence, between, questions = (
                options.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert silence + between * questions <= 60
        finally:
            transport.abort()
            await asyncio.sleep(0)
