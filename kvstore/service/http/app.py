"""The aiohttp application: lets requests in, has their bodies checked, and turns errors into problems."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from kvstore import logs
from kvstore.config.sections import ServiceConfig
from kvstore.errors import ConfigError, KVStoreError, RequestError, StoreClosed
from kvstore.ownership import check_secret
from kvstore.service.daemon.state import DaemonState
from kvstore.service.daemon.tenants import LOCAL, Tenant
from kvstore.service.daemon.transfers import TooManyTransfers
from kvstore.service.http import problems
from kvstore.service.http.api import Api
from kvstore.service.http.parsing import Parser
from kvstore.service.http.problems import Problem
from kvstore.service.http.routes import ApiCall, Route, document
from kvstore.service.protocol.frames import encode_json
from kvstore.web.bodies import Bodies, BodyError, bad_body
from kvstore.web.connections import Connection, Connections
from kvstore.web.descriptors import Budget
from kvstore.web.server import BAD_BODY, WebServer, bind

log = logs.limited(__name__)


class App:
    """The HTTP side of a daemon. Its event loop only."""

    def __init__(
        self,
        state: DaemonState,
        budget: Budget,
        more_routes: Sequence[Route] = (),
        add_files: Callable[[web.UrlDispatcher], None] = lambda router: None,
    ) -> None:
        """more_routes: operations beside the API's own; add_files: adds what needs no token, the dashboard's page."""
        self.port = 0
        self.num_requests = 0
        self.num_refused = 0
        self.parser = Parser()
        self.connections = Connections(budget.http, max(1, budget.http // 2))
        self._state = state
        self._add_files = add_files
        self._server: WebServer | None = None
        self._bodies = Bodies()
        self.routes = [*Api(state, self.parser).routes(), *more_routes]
        self._document = encode_json(document(self.routes, state.version, with_tokens=state.tokens is not None))

    async def start(self, config: ServiceConfig) -> None:
        """Listen, if there is a port. Raises ConfigError for an address that cannot be had, or open to everybody."""
        check_exposure(config)
        context = _tls(config)
        app = web.Application(middlewares=[self._middleware])
        for route in self.routes:
            app.router.add_route(route.method, route.path, self._handler(route))
        app.router.add_get("/v1/openapi.json", self._openapi)
        self._add_files(app.router)
        server = WebServer(app, self._form)
        await server.start()
        self._server = server
        if config.http_port is None:
            return
        try:
            sockets = bind(config.http_host, config.http_port)
        except OSError as error:
            await self.close()
            raise ConfigError(
                f"service.http_host {config.http_host}, service.http_port {config.http_port}: {error.strerror or error}"
            ) from None
        self.port = sockets[0].getsockname()[1]
        for raw in sockets:
            server.listen("http", raw, self.connections, context, self.connections.drop_one)
        log.info("HTTP API on %s:%d%s", config.http_host, self.port, " with TLS" if context else "")

    def protocol(self, connection: Connection) -> asyncio.Protocol | None:
        """Serve HTTP on a connection that was accepted elsewhere: by the unix socket. None before and after."""
        return None if self._server is None else self._server.protocol(connection)

    async def close(self) -> None:
        """Stop listening and hang up. Idempotent."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.close()

    # ---- one request ------------------------------------------------------------------------------------------------

    def _handler(self, route: Route) -> Any:
        async def handle(request: web.Request) -> web.StreamResponse:
            tenant = LOCAL if route.is_open else self._tenant(request)
            if route.needs_operator and not tenant.is_operator:
                raise Problem(403, "this is for operators", "the tenant's entry in the tokens file says who is one")
            answer = await route.handler(ApiCall(request, tenant, *await self._body(route, request)))
            if isinstance(answer, web.StreamResponse):
                return answer
            return web.Response(body=answer.model_dump_json().encode(), content_type="application/json")

        return handle

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.num_requests += 1
        try:
            self._check_host(request)
            response: web.StreamResponse = await handler(request)
            return response
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            problem = _problem(request, error)
            if problem.status >= 500 and not isinstance(error, (Problem, StoreClosed)):
                # Its text may hold what was sent, a token included: the type and the place are enough to find it.
                log.error("%s %s failed: %s", request.method, _place(request), logs.where(error))
            return self._refuse(request, problem)

    def _form(self, status: int, title: str, detail: str, field: str) -> web.Response:
        self.num_refused += 1
        return Problem(status, title, detail, field).response()

    def _refuse(self, request: web.Request, problem: Problem) -> web.Response:
        self.num_refused += 1
        response = problem.response()
        if request.can_read_body and not request.content.at_eof():
            response.force_close()  # what is left of the body is not read
        return response

    async def _body(self, route: Route, request: web.Request) -> tuple[Any, int]:
        """What was sent, checked, and how many bytes of JSON that were."""
        if route.query is not None:
            for name in request.query:
                if len(request.query.getall(name)) > 1:
                    raise Problem(400, "the query is not valid", "given more than once", name[:64])
            try:
                return route.query.model_validate(dict(request.query)), 0
            except ValidationError as error:
                raise problems.of_validation(error, "query") from None
        if route.body is None:
            return None, 0
        # Browsers send what asks for no leave of ours (text, forms) from any page: only the announced type is read.
        if request.content_type != route.consumes:
            raise Problem(415, f"the body must be {route.consumes}", field="Content-Type")
        if route.consumes != "application/json":
            return None, 0  # the handler reads it as it comes
        raw = await self._bodies.read(request)
        return await self.parser.read(route.body, raw), len(raw)

    def _tenant(self, request: web.Request) -> Tenant:
        tokens = self._state.tokens
        if tokens is None or _is_unix(request):
            return LOCAL
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        tenant = tokens.find(token.strip()) if kind.lower() == "bearer" else None
        if tenant is None:
            raise Problem(401, "a token is needed", "send: Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")
        return tenant

    def _check_host(self, request: web.Request) -> None:
        """Without tokens only names we know are answered: a page elsewhere could rebind its own name to us."""
        try:
            host = (request.url.host or "").strip("[]")
        except ValueError:
            raise Problem(400, "the Host header is not valid", field="Host") from None
        names = (self._state.config.service.http_names or "").split(",")
        if self._state.tokens is None and not _is_loopback(host) and (not host or host not in names):
            raise Problem(400, "the Host header names another machine", field="Host")

    # ---- a route beside the table --------------------------------------------------------------------------------

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")


def check_exposure(config: ServiceConfig) -> None:
    """Raise ConfigError if the API would be open to other machines without tokens."""
    if not _is_loopback(config.http_host) and config.tokens_file is None and not config.http_names:
        raise ConfigError(
            f"service.http_host is {config.http_host!r}, which other machines can reach; set service.tokens_file first "
            "(and tls_cert and tls_key, unless the network is trusted)"
        )
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ConfigError("service.tls_cert and service.tls_key belong together; give both or none")


def _is_unix(request: web.Request) -> bool:
    """Whether it came by the unix socket, which is its owner's alone."""
    return request.transport is not None and isinstance(request.transport.get_extra_info("sockname"), (str, bytes))


def _tls(config: ServiceConfig) -> ssl.SSLContext | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    check_secret("service.tls_key", config.tls_key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # With a password of "" a key that is encrypted is an error; without one OpenSSL would ask the terminal.
        context.load_cert_chain(config.tls_cert, config.tls_key, password="")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"service.tls_cert {config.tls_cert}, tls_key {config.tls_key}: {error}") from None
    return context


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _problem(request: web.Request, error: Exception) -> Problem:
    """The answer to a request that failed."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, web.HTTPException):
        allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        field = {404: "path", 405: "method"}.get(error.status, "")
        return Problem(error.status, error.reason.lower(), field=field, **allowed)
    if isinstance(error, BAD_BODY):
        error = bad_body(request, error)
    if isinstance(error, BodyError):
        retry = {"Retry_After": "1"} if error.status == 429 else {}
        return Problem(error.status, "the body is not taken", str(error), error.field, **retry)
    if isinstance(error, RequestError):
        return Problem(400, "the request is not valid", str(error), _field(error))
    if isinstance(error, TooManyTransfers):
        return Problem(429, "too many transfers of pages", str(error), Retry_After="1")
    if isinstance(error, StoreClosed):
        return Problem(503, "the daemon is closing", Retry_After="1")
    if isinstance(error, ConfigError):
        # Well formed, but not with what is configured here, or not in itself (a window for a full group).
        return Problem(409, "not possible here", str(error), _field(error))
    if isinstance(error, KVStoreError):
        return Problem(409, "not possible now", str(error))
    return Problem(500, "a fault in the daemon")


def _place(request: web.Request) -> str:
    """The path of a request as the table of routes has it: what was sent in its place may be anything."""
    resource = request.match_info.route.resource
    return "an unknown path" if resource is None else resource.canonical


def _field(error: KVStoreError) -> str:
    """Our messages begin with the field: "layout.block_size is 0; ..."."""
    return str(error).split(" ", 1)[0].rstrip(":")[:64]
