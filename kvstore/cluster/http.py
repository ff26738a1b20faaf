"""What replica and router have in common in HTTP: listening, bodies, answers, errors in OpenAI's form."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from kvstore.cluster.openai import ApiError
from kvstore.errors import ConfigError
from kvstore.service.protocol import encode_json

MAX_BODY_BYTES = 16 << 20  # a million tokens as JSON
BODY_TIMEOUT_S = 30.0
SHUTDOWN_S = 1.0


class Site:
    """An application on a port. A handler is cancelled when its client leaves."""

    def __init__(self, app: web.Application, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._app = app
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Listen; `port` is then the one that was taken. Raises ConfigError if the address cannot be had."""
        self._runner = web.AppRunner(
            self._app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self.host, self.port, backlog=1024).start()
        except OSError as error:
            await self.close()
            raise ConfigError(
                f"--host {self.host} --port {self.port}: {error.strerror or error}; name another port, or 0 for any"
            ) from None
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stop listening and hang up. Idempotent."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


async def read_body(request: web.Request) -> bytes:
    """The body. Raises ApiError if it is too long or does not come."""
    try:
        return await asyncio.wait_for(request.read(), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_TIMEOUT_S:.0f} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise ApiError(413, f"the body is longer than {MAX_BODY_BYTES} bytes") from None


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """An answer in JSON."""
    return web.Response(status=status, body=encode_json(body), content_type="application/json", headers=headers)


def error_response(request: web.Request, error: ApiError) -> web.Response:
    """An error in OpenAI's form."""
    response = json_response(error.body, error.status, error.headers)
    if request.can_read_body and not request.content.at_eof():
        response.force_close()  # what is left of the body is not read
    return response
