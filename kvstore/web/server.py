"""An aiohttp application behind connections of ours: with limits, and an answer for what is no request at all.

Daemon, replica and router serve by it. aiohttp parses and dispatches; what it has no limit for is here:

    a request's head   HEAD_S from the connection's first moment, or from the first byte after an answer
    its body           see bodies.py
    an answer          STALL_S without room for more of it
    nothing at all     IDLE_S after an answer

Malformed requests are answered in the form of the server's other errors and logged without a byte of theirs: they may
hold a token in any place. The event loop only.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import http_exceptions, web

from kvstore import logs
from kvstore.web.connections import Connection, Connections, State
from kvstore.web.listener import Listener

log = logs.limited(__name__)

HEAD_S = 10.0
IDLE_S = 75.0
STALL_S = 60.0
LINGER_S = 2.0  # for the rest of a body that is not read
SHUTDOWN_S = 1.0
MAX_LINE = 16384
BACKLOG = 256

# A word of aiohttp's reason (which goes no further: it may hold the request) -> what the answer names.
_FIELDS = (
    ("content-length", "Content-Length"),
    ("content-encoding", "Content-Encoding"),
    ("can not decode", "Content-Encoding"),
    ("transfer-encoding", "Transfer-Encoding"),
    ("chunk", "Transfer-Encoding"),
    ("host", "Host"),
    ("upgrade", "Upgrade"),
    ("header", "headers"),
    ("method", "method"),
    ("url", "path"),
    ("version", "version"),
)

# What aiohttp raises where a body is read that its headers do not describe.
BAD_BODY = (web.RequestPayloadError, http_exceptions.HttpProcessingError)

# Makes an answer of: status, title, detail, field.
Form = Callable[[int, str, str, str], web.Response]


class Handler(web.RequestHandler):
    """One HTTP connection. It tells its `Connection` what it does, and ends itself when it takes too long."""

    __slots__ = ("_connection", "_form", "_timer")

    def __init__(
        self,
        server: web.Server,
        connection: Connection,
        form: Form,
        *,
        loop: asyncio.AbstractEventLoop,
        **options: Any,
    ) -> None:
        super().__init__(server, loop=loop, **options)
        self._connection = connection
        self._form = form
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connection.drop = transport.abort  # type: ignore[attr-defined]
        self._give(HEAD_S)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._give(None)
        self._connection.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._connection.state is State.IDLE and data:
            self._connection.move(State.NEW)
            self._give(HEAD_S)
        super().data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._connection.move(State.STALLED)
        self._give(STALL_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._connection.move(State.BUSY)
        self._give(None)

    def began(self, *, has_body: bool) -> None:
        """A request's head is here, and its body is on its way; whoever reads that has a limit of its own."""
        self._connection.move(State.READING if has_body else State.BUSY)
        self._give(None)

    def working(self) -> None:
        """The body is here."""
        if self._connection.state is State.READING:
            self._connection.move(State.BUSY)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException):  # raised before there was anything of ours around: by `Expect`
            field = "Expect" if resp.status == 417 else "request"
            resp = self._form(resp.status, resp.reason.lower(), "", field)
            resp.force_close()
        result = await super().finish_response(request, resp, start_time)
        if not self.writing_paused:
            self._connection.move(State.IDLE)
            self._give(IDLE_S)
        return result

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no request, or to a fault that nobody else has seen to."""
        if status < 500:
            log.info("%s: a malformed request: %s", self._connection.peer, type(exc).__name__)
        else:
            log.error("%s: a request failed: %s", self._connection.peer, "-" if exc is None else logs.where(exc))
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun, and no other can follow it")
        if status < 500:
            response = self._form(status, "the request is malformed", *_reason(exc))
        else:
            response = self._form(status, "a fault in the server", "", "")
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        error = kw.get("exc_info")
        if isinstance(error, BAD_BODY):  # found only when the rest of a body was read to be dropped
            log.info("%s: a malformed body: %s", self._connection.peer, type(error).__name__)
            return
        place = logs.where(error) if isinstance(error, BaseException) else "no answer was made"
        log.error("%s: a request failed: %s", self._connection.peer, place)

    def _give(self, seconds: float | None) -> None:
        """So long for what it does now; None sets no limit."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            self._timer = self._loop.call_later(seconds, self._end)

    def _end(self) -> None:
        self._timer = None
        if self.transport is not None:
            self.transport.abort()


class WebServer:
    """Listens for an application. Its event loop only.

    form:      makes the answers to what is no request.
    handler_cancellation: a handler is cancelled when its client leaves.
    """

    def __init__(self, app: web.Application, form: Form, *, handler_cancellation: bool = False) -> None:
        app.middlewares.insert(0, _note)
        self._form = form
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            handler_cancellation=handler_cancellation,
            shutdown_timeout=SHUTDOWN_S,
        )
        self._listeners: list[Listener] = []

    async def start(self) -> None:
        """Be ready for `protocol`."""
        await self._runner.setup()

    def listen(
        self,
        name: str,
        raw: socket.socket,
        connections: Connections,
        tls: ssl.SSLContext | None = None,
        make_way: Callable[[], bool] = lambda: False,
    ) -> Listener:
        """Serve on a bound socket, which is the server's from now on."""
        raw.listen(BACKLOG)
        listener = Listener(name, raw, connections, self.protocol, tls=tls, make_way=make_way)
        listener.start()
        self._listeners.append(listener)
        return listener

    def protocol(self, connection: Connection) -> Handler | None:
        """The HTTP handler of a connection. None before the start and after the end."""
        server = self._runner.server
        if server is None:
            return None
        return Handler(
            server,
            connection,
            self._form,
            loop=asyncio.get_running_loop(),
            access_log=None,
            logger=_SILENT,
            keepalive_timeout=IDLE_S,
            lingering_time=LINGER_S,
            max_line_size=MAX_LINE,
        )

    async def close(self) -> None:
        """Stop listening and hang up. Idempotent."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        await self._runner.cleanup()


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to all addresses of a host, on one port: 0 takes any free one. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    try:
        for family, kind, number, _, address in dict.fromkeys(found):
            raw = socket.socket(family, kind, number)
            bound.append(raw)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken = bound[0].getsockname()[1] if len(bound) > 1 else port
            try:
                raw.bind((address[0], taken, *address[2:]))
            except OSError as error:
                # A name may have an address of a kind that this machine does not have: localhost without IPv6.
                if error.errno != errno.EADDRNOTAVAIL or len(found) == 1:
                    raise
                bound.pop().close()
        if not bound:
            raise OSError(errno.EADDRNOTAVAIL, f"none of the addresses of {host} is this machine's")
    except BaseException:
        for raw in bound:
            raw.close()
        raise
    return bound


@web.middleware
async def _note(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    if isinstance(request.protocol, Handler):
        request.protocol.began(has_body=request.can_read_body)
    return await handler(request)


def _reason(exc: BaseException | None) -> tuple[str, str]:
    """A detail and a field for a malformed request, with nothing of the request in them."""
    if isinstance(exc, http_exceptions.LineTooLong):
        return f"a line of its head is longer than {MAX_LINE} bytes, or there are too many", "headers"
    if isinstance(exc, http_exceptions.InvalidURLError):
        return "the path is not valid", "path"
    if isinstance(exc, http_exceptions.BadHttpMethod):
        return "the method is not valid", "method"
    if isinstance(exc, http_exceptions.BadStatusLine):
        return "the request line is not METHOD PATH HTTP/1.1", "request line"
    if isinstance(exc, http_exceptions.InvalidHeader):
        return "a header is not valid", "headers"
    if isinstance(exc, http_exceptions.ContentEncodingError):
        return "the body is not what Content-Encoding says", "Content-Encoding"
    text = str(getattr(exc, "message", "")).partition("\n")[0].lower()
    field = next((field for word, field in _FIELDS if word in text), "request")
    return f"{field} is not valid", field


_SILENT = logging.getLogger(f"{__name__}.aiohttp")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False
_SILENT.disabled = True
