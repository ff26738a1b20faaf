"""The files of the page at `/`: plain HTML, CSS and ES modules beside this module, read once; two are made (kinds).

They hold no data, so they are answered without a token; what the page then asks for needs one. Nothing outside this
daemon is referred to, and the policy says so: no inline script, no foreign host, no frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from kvstore.service.dashboard import kinds

DIRECTORY = Path(__file__).with_name("static")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask whether it is still the same: a new daemon may bring a new page
}


def add_routes(router: web.UrlDispatcher) -> None:
    """`/` and `/page/NAME`."""
    for path in sorted(DIRECTORY.iterdir()):
        if path.suffix in TYPES:
            handler = _handler(path.read_bytes(), TYPES[path.suffix])
            router.add_get("/" if path.name == "index.html" else f"/page/{path.name}", handler)
    for name, make in (("kinds.js", kinds.script), ("kinds.css", kinds.sheet)):
        router.add_get(f"/page/{name}", _handler(make(), TYPES[Path(name).suffix]))


def _handler(body: bytes, content_type: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'

    async def answer(request: web.Request) -> web.Response:
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        response = web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)
        response.enable_compression()
        return response

    return answer
