"""Errors of the HTTP API: application/problem+json (RFC 9457), with the field that is wrong."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from pydantic import ValidationError

from kvstore.service.protocol.frames import encode_json

CONTENT_TYPE = "application/problem+json"


class Problem(Exception):
    """An error as an answer. field: a path such as "tokens.3"; "" if it is no field's."""

    def __init__(self, status: int, title: str, detail: str = "", field: str = "", **headers: str) -> None:
        super().__init__(detail or title)
        self.status = status
        self.title = title
        self.detail = detail
        self.field = field
        self.headers = headers
        self.reasons: list[str] = []

    def response(self) -> web.Response:
        """The answer."""
        body: dict[str, Any] = {"type": "about:blank", "title": self.title, "status": self.status}
        if self.detail:
            body["detail"] = self.detail
        if self.field:
            body["field"] = self.field
        if self.reasons:
            body["reasons"] = self.reasons
        headers = {name.replace("_", "-"): value for name, value in self.headers.items()}
        return web.Response(status=self.status, body=encode_json(body), content_type=CONTENT_TYPE, headers=headers)


def of_validation(error: ValidationError, where: str) -> Problem:
    """The first thing that is wrong with a body or a query. The value itself is not repeated: it may be a prompt."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return Problem(400, f"the {where} is not valid", first["msg"][:500], field or where)
