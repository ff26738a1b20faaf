"""The HTTP that replica and router share: listening, bodies, answers, errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from kvstore.cluster.openai import ApiError
from kvstore.errors import ConfigError
from kvstore.service.protocol.frames import encode_json
from kvstore.web import descriptors
from kvstore.web.bodies import Bodies, BodyError, bad_body
from kvstore.web.connections import Connections
from kvstore.web.server import BAD_BODY, WebServer, bind


class Site:
    """An application on a port. A handler is cancelled when its client leaves."""

    def __init__(self, app: web.Application, host: str, port: int) -> None:
        self.host = host
        self.port = port
        budget = descriptors.budget(descriptors.limit())
        self.connections = Connections(budget.http, max(1, budget.http // 2))
        self._app = app
        self._server: WebServer | None = None

    @property
    def url(self) -> str:
        """The address at which it listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Listen; `port` is then the one that was taken. Raises ConfigError if the address cannot be had."""
        self._server = WebServer(self._app, _malformed, handler_cancellation=True)
        await self._server.start()
        try:
            sockets = bind(self.host, self.port)
        except OSError as error:
            await self.close()
            raise ConfigError(
                f"--host {self.host} --port {self.port}: {error.strerror or error}; name another port, or 0 for any"
            ) from None
        self.port = sockets[0].getsockname()[1]
        for raw in sockets:
            self._server.listen("http", raw, self.connections, make_way=self.connections.drop_one)

    async def close(self) -> None:
        """Stop listening and hang up. Idempotent."""
        if self._server is not None:
            await self._server.close()
            self._server = None


async def read_body(request: web.Request, bodies: Bodies) -> bytes:
    """The body. Raises ApiError if it is too long, does not come, or is not what its headers say."""
    try:
        return await bodies.read(request)
    except BodyError as error:
        raise of_body(error) from None


def of_body(error: BodyError) -> ApiError:
    """A body that is not taken, in OpenAI's form."""
    if error.status == 429:
        return ApiError(429, str(error), kind="rate_limit_error", code="bodies", retry_after_s=1)
    return ApiError(error.status, str(error), param=error.field)


def of_library(request: web.Request, error: Exception) -> ApiError | None:
    """An error that aiohttp raises for a bad request, in OpenAI's form; None for any other error."""
    if isinstance(error, BAD_BODY):
        return of_body(bad_body(request, error))
    if isinstance(error, web.HTTPException):
        return ApiError(error.status, error.reason.lower(), param={404: "path", 405: "method"}.get(error.status))
    return None


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """An answer in JSON."""
    return web.Response(status=status, body=encode_json(body), content_type="application/json", headers=headers)


def error_response(request: web.Request, error: ApiError) -> web.Response:
    """An error in OpenAI's form."""
    response = json_response(error.body, error.status, error.headers)
    if request.can_read_body and not request.content.at_eof():
        response.force_close()  # what is left of the body is not read
    return response


def _malformed(status: int, title: str, detail: str, field: str) -> web.Response:
    error = ApiError(status, f"{title}: {detail}" if detail else title, param=field or None)
    return json_response(error.body, status)
