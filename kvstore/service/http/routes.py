"""One table of routes: what the server dispatches by, and what the OpenAPI document is made from.

A route's body and query are pydantic models; a handler is called only with what they accepted. So the document, the
checks and the code cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from pydantic import BaseModel

from kvstore.plan.records import HOST
from kvstore.service.daemon.tenants import Tenant
from kvstore.service.http.answers import Answer, ProblemAnswer
from kvstore.tiers import registry


@dataclass(frozen=True, slots=True)
class ApiCall:
    """One request that was let in.

    body: an instance of the route's body or query model; None if it has none. num_bytes: of a body of JSON.
    """

    request: web.Request
    tenant: Tenant
    body: Any
    num_bytes: int = 0


Handler = Callable[[ApiCall], Awaitable[Answer | web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One operation.

    body, query:  models of what is sent; at most one of them.
    answer:       model of the 200 answer; None where it is not JSON (then `produces`).
    is_open:      answers without a token.
    needs_operator: refused to tenants that are no operators.
    errors:       problems besides 400, 401 and 415 that it answers with.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    produces: str = "application/json"
    consumes: str = "application/json"
    is_open: bool = False
    needs_operator: bool = False
    errors: tuple[int, ...] = ()

    @property
    def path_fields(self) -> list[str]:
        """Names in braces."""
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]


_PATH_SCHEMAS: dict[str, dict[str, Any]] = {  # and the tier, see _path_schema
    "namespace": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    "client": {"type": "string", "pattern": "^[0-9]{1,18}$"},
}


def document(routes: list[Route], version: str, *, with_tokens: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the routes."""
    schemas: dict[str, Any] = {}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas, with_tokens)
    components: dict[str, Any] = {"schemas": schemas}
    if with_tokens:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvstore node daemon", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": components,
    }


def _path_schema(name: str) -> dict[str, Any]:
    if name == "tier":
        return {"type": "string", "enum": [HOST, *registry.names()]}
    return _PATH_SCHEMAS[name]


def _operation(route: Route, schemas: dict[str, Any], with_tokens: bool) -> dict[str, Any]:
    ok: dict[str, Any] = {"description": "Done."}
    if route.answer is not None:
        ok["content"] = {"application/json": {"schema": _schema(route.answer, schemas)}}
    else:
        ok["content"] = {route.produces: {"schema": {} if route.produces == "application/json" else {"type": "string"}}}
    problem = {"content": {"application/problem+json": {"schema": _schema(ProblemAnswer, schemas)}}}
    responses: dict[str, Any] = {"200": ok}
    errors = {400, *route.errors}
    if with_tokens and not route.is_open:
        errors |= {401, 403} if route.needs_operator else {401}
    if route.body is not None:
        errors |= {408, 413, 415, 429}
    for status in sorted(errors):
        responses[str(status)] = {"description": _STATUS_TEXT[status], **problem}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{route.path.replace('/', '_').replace('{', '').replace('}', '')}",
        "responses": responses,
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _path_schema(name)} for name in route.path_fields
    ]
    if route.query is not None:
        shape = route.query.model_json_schema()
        parameters += [
            {"name": name, "in": "query", "required": name in shape.get("required", ()), "schema": schema}
            for name, schema in shape["properties"].items()
        ]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        content: dict[str, Any] = {"schema": _schema(route.body, schemas)}
        if route.consumes != "application/json":
            content = {"schema": {"type": "string", "format": "binary"}}
        operation["requestBody"] = {"required": True, "content": {route.consumes: content}}
    if with_tokens and not route.is_open:
        operation["security"] = [{"token": []}]
    return operation


_STATUS_TEXT = {
    400: "Something sent is not valid; `field` names it.",
    401: "No token, or not a known one.",
    403: "Not for this tenant.",
    404: "There is no such namespace, tier or client.",
    408: "The body did not come in time.",
    409: "Not possible in the state things are in.",
    413: "The body is too large.",
    415: "The body is of another kind.",
    429: "Too many at once.",
    503: "The daemon starts or ends.",
    507: "No room.",
}


def _schema(model: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    if model.__name__ not in schemas:
        shape = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= shape.pop("$defs", {})
        schemas[model.__name__] = shape
    return {"$ref": f"#/components/schemas/{model.__name__}"}
