"""Requests that are malformed or mislabelled, each with a secret in it, and what a server says to them.

They are bytes on a socket: an HTTP client would mend most of them.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SECRET = "hunter2-0123456789-abcdef"
Address = Path | int  # a unix socket, or a port of this machine


def head(line: bytes, *lines: bytes, host: bytes = b"localhost") -> bytes:
    """A request's head."""
    return b"\r\n".join([line, b"Host: " + host, *lines, b"", b""])


def post(path: str, body: bytes, *lines: bytes, kind: bytes = b"application/json", length: bool = True) -> bytes:
    """A POST whose headers say what is given."""
    sizes = [b"Content-Length: %d" % len(body)] if length else []
    return head(b"POST " + path.encode() + b" HTTP/1.1", b"Content-Type: " + kind, *sizes, *lines) + body


def odd_requests(path: str, body: bytes, method: str = "POST") -> dict[str, bytes]:
    """By name. path, body: of a request that would be right."""
    secret, bearer = SECRET.encode(), f"Authorization: Bearer {SECRET}".encode()
    line = f"{method} {path} HTTP/1.1".encode()
    chunked = b"Transfer-Encoding: chunked"
    packed = gzip.compress(body)
    found = {
        # ---- heads
        "a token in the query": head(f"GET {path}?token={SECRET} HTTP/1.1".encode()),
        "a token in the path": head(f"GET /{SECRET} HTTP/1.1".encode()),
        "a token in the fragment": head(f"GET {path}#{SECRET} HTTP/1.1".encode()),
        "a token in the method": head(f"{SECRET} {path} HTTP/1.1".encode()),
        "an unknown method": head(f"BREW {path} HTTP/1.1".encode(), bearer),
        "a wrong method": head(f"DELETE {path} HTTP/1.1".encode(), bearer),
        "a token in the version": head(f"GET {path} {SECRET}".encode()),
        "no version": head(f"GET {path}".encode(), bearer),
        "a version of the future": head(f"GET {path} HTTP/9.9".encode(), bearer),
        "an old version": head(f"{method} {path} HTTP/1.0".encode(), bearer),
        "no line at all": b"\r\n\r\n" + bearer + b"\r\n\r\n",
        "a token alone": secret + b"\r\n\r\n",
        "a header without a colon": head(line, b"Authorization Bearer " + secret),
        "a header that begins with a space": head(line, b" " + bearer),
        "a header with a space before its colon": head(line, b"Authorization : Bearer " + secret),
        "a header with a zero": head(line, bearer + b"\x00"),
        "a header with a control character": head(line, b"Authorization: Bearer \x01" + secret),
        "a header with bytes above 127": head(line, b"Authorization: Bearer \xff\xfe" + secret),
        "a header with a bare line feed": head(line, b"X: a\nAuthorization: Bearer " + secret),
        "a header of 100 KB": head(line, bearer + b"a" * 100_000),
        "a thousand headers": head(line, *[b"X-%d: %s" % (i, secret) for i in range(1000)]),
        "a path of 100 KB": head(f"GET /{SECRET}{'a' * 100_000} HTTP/1.1".encode()),
        "another scheme": head(line, b"Authorization: Basic " + secret),
        "a token twice": head(line, bearer, bearer),
        "a token in a cookie": head(line, b"Cookie: token=" + secret),
        "a token in the host": head(line, host=secret),
        "a token as the user of the host": head(line, host=secret + b"@localhost"),
        "a host with a bad port": head(line, bearer, host=b"localhost:x" + secret),
        "a host with an open bracket": head(line, bearer, host=b"[" + secret),
        "an empty host": head(line, bearer, host=b""),
        "two hosts": head(line, b"Host: " + secret, bearer),
        "no host": line + b"\r\n" + bearer + b"\r\n\r\n",
        "an absolute path": head(f"GET http://u:{SECRET}@localhost{path} HTTP/1.1".encode()),
        "an authority": head(f"CONNECT u:{SECRET}@localhost:1 HTTP/1.1".encode()),
        "a star": head(b"OPTIONS * HTTP/1.1", bearer),
        "a zero in the path": head(f"GET {path}%00{SECRET} HTTP/1.1".encode()),
        "a path that is no UTF-8": head(f"GET {path}%ff%fe{SECRET} HTTP/1.1".encode()),
        "raw bytes in the path": head(f"GET {path}".encode() + b"\xff\xfe" + secret + b" HTTP/1.1"),
        "a half escape": head(f"GET {path}%2 HTTP/1.1".encode(), bearer),
        "dots in the path": head(f"GET /../..{path} HTTP/1.1".encode(), bearer),
        "a query of nonsense": head(f"GET {path}?%ff=%00&&==&{SECRET}=%zz HTTP/1.1".encode()),
        "an unknown expectation": head(line, bearer, b"Expect: " + secret),
        "an upgrade": head(line, bearer, b"Connection: Upgrade", b"Upgrade: " + secret),
        "an upgrade to HTTP/2": head(
            line, bearer, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"
        ),
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + secret,
        "a websocket": head(
            line, bearer, b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: " + secret
        ),
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + secret,
        # ---- lengths
        "a negative length": post(path, body, bearer, b"Content-Length: -5", length=False),
        "a huge length": post(path, body, bearer, b"Content-Length: 99999999999999999999", length=False),
        "a length of 16 EiB": post(path, body, bearer, b"Content-Length: 18446744073709551615", length=False),
        "a length that is a token": post(path, body, b"Content-Length: " + secret, length=False),
        "two lengths": post(path, body, bearer, b"Content-Length: 3"),
        "a length and chunks": post(path, b"0\r\n\r\n", bearer, chunked),
        "a body that is too short": post(path, body, bearer, b"Content-Length: %d" % (len(body) + 9), length=False),
        "no body": post(path, b"", bearer),
        "no length": post(path, body, bearer, length=False),
        # ---- chunks
        "chunks that are none": post(path, b"zz\r\n" + secret + b"\r\n", bearer, chunked, length=False),
        "a negative chunk": post(path, b"-1\r\n" + secret + b"\r\n0\r\n\r\n", bearer, chunked, length=False),
        "a huge chunk": post(path, b"f" * 40 + b"\r\n" + secret, bearer, chunked, length=False),
        "a chunk that is too long": post(path, b"2\r\n" + secret + b"\r\n0\r\n\r\n", bearer, chunked, length=False),
        "a chunk with an extension": post(
            path, b"%x;%s\r\n%s\r\n0\r\n\r\n" % (len(body), secret, body), bearer, chunked, length=False
        ),
        "a trailer": post(path, b"%x\r\n%s\r\n0\r\n%s\r\n\r\n" % (len(body), body, bearer), chunked, length=False),
        "an unknown transfer": post(path, body, bearer, b"Transfer-Encoding: " + secret),
        "chunks after chunks": post(path, body, bearer, b"Transfer-Encoding: chunked, chunked", length=False),
        # ---- encodings
        "gzip that is none": post(path, body, bearer, b"Content-Encoding: gzip"),
        "gzip that is cut": post(path, packed[:-9], bearer, b"Content-Encoding: gzip"),
        "gzip with more behind": post(path, packed + secret, bearer, b"Content-Encoding: gzip"),
        "deflate that is none": post(path, body, bearer, b"Content-Encoding: deflate"),
        "deflate that is cut": post(path, zlib.compress(body)[:-5], bearer, b"Content-Encoding: deflate"),
        "brotli that is none": post(path, body, bearer, b"Content-Encoding: br"),
        "zstd that is none": post(path, body, bearer, b"Content-Encoding: zstd"),
        "an encoding that is a token": post(path, body, b"Content-Encoding: " + secret),
        "a bomb": post(path, gzip.compress(b" " * (64 << 20)), bearer, b"Content-Encoding: gzip"),
        "gzip in chunks that are none": post(
            path, b"5\r\nhello\r\nzz", bearer, b"Content-Encoding: gzip", chunked, length=False
        ),
        # ---- kinds
        "no kind": head(line, bearer, b"Content-Length: %d" % len(body)) + body,
        "a wrong kind": post(path, body, bearer, kind=b"text/plain"),
        "a kind that is a token": post(path, body, kind=secret),
        "a kind with bytes above 127": post(path, body, bearer, kind=b"application/json; x=\xff"),
        "a form": post(path, b"--" + secret, bearer, kind=b"multipart/form-data; boundary=" + secret),
        "an unknown charset": post(path, body, bearer, kind=b"application/json; charset=" + secret),
        "UTF-16": post(path, body.decode().encode("utf-16"), bearer, kind=b"application/json; charset=utf-16"),
        "UTF-7": post(path, body, bearer, kind=b"application/json; charset=utf-7"),
    }
    for name, text in ODD_JSON.items():
        found[f"JSON: {name}"] = post(path, text, bearer)
    return found


ODD_JSON = {
    "none": SECRET.encode(),
    "text": json.dumps(SECRET).encode(),
    "null": b"null",
    "a number": b"17",
    "a list": json.dumps([SECRET]).encode(),
    "an unknown field": json.dumps({SECRET: SECRET}).encode(),
    "an unknown field that no encoding has": b'{"\\ud800": 1}',
    "invalid UTF-8": b'{"tokens": ["\xff\xfe' + SECRET.encode() + b'"]}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a field twice": b'{"tokens": [1], "tokens": [2], "prompt": "a", "prompt": "b"}',
    "deep lists": b'{"tokens": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "not a number": b'{"tokens": [1], "timeout_s": NaN, "prompt": "a", "temperature": NaN}',
    "infinity": b'{"tokens": [Infinity], "prompt": [Infinity]}',
    "1e999": b'{"tokens": [1e999], "prompt": [1e999]}',
    "an integer of 400 digits": b'{"tokens": [' + b"9" * 400 + b'], "prompt": [' + b"9" * 400 + b"]}",
    "an integer of 5000 digits": b'{"tokens": [' + b"9" * 5000 + b'], "prompt": [' + b"9" * 5000 + b"]}",
    "a timeout of 400 digits": b'{"tokens": [1], "timeout_s": ' + b"9" * 400 + b"}",
    "a negative token": b'{"tokens": [-1], "prompt": [-1]}',
    "a token id above 2^32": b'{"tokens": [4294967296], "prompt": [4294967296]}',
    "a token id above 2^63": b'{"tokens": [9223372036854775808], "prompt": [9223372036854775808]}',
    "true for a token": b'{"tokens": [true], "prompt": [true]}',
    "text for tokens": json.dumps({"tokens": SECRET, "prompt": {"a": SECRET}}).encode(),
    "a lone surrogate": b'{"keys": ["\\ud800"], "prompt": "\\ud800 and \\udfff"}',
    "a lone surrogate for a name": b'{"prompt": "a", "model": "\\ud800", "namespace": "\\ud800"}',
    "a lone surrogate for a tenant": b'{"prompt": "a", "max_tokens": 1, "kvstore": {"tenant": "\\ud800"}}',
    "a lone surrogate to stop at": b'{"prompt": "a", "max_tokens": 1, "stop": ["\\ud800"]}',
    "a zero in a text": b'{"prompt": "a\\u0000b", "max_tokens": 1, "namespace": "\\u0000"}',
    "control characters": b'{"tokens": [\x01]}',
    "a huge answer": b'{"prompt": "a", "max_tokens": ' + b"9" * 400 + b"}",
    "a huge seed": b'{"prompt": "a", "max_tokens": 1, "seed": ' + b"9" * 400 + b"}",
    "an endless tail": b'{"tokens": [1]} ' + SECRET.encode(),
    "an open string": b'{"tokens": "' + SECRET.encode(),
}


def talk(address: Address, data: bytes, *, patience_s: float = 2.0) -> bytes:
    """What a server says to bytes. One that says nothing for `patience_s`, as it waits for more, hears of the end."""
    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    answer = b""
    with socket.socket(family) as connection:
        connection.settimeout(20.0)
        connection.connect(("127.0.0.1", address) if isinstance(address, int) else str(address))
        with suppress(ConnectionError):
            connection.sendall(data)
        connection.settimeout(patience_s)
        try:
            while not is_whole(answer) and (piece := connection.recv(65536)):
                answer += piece
        except TimeoutError:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(20.0)
                while not is_whole(answer) and (piece := connection.recv(65536)):
                    answer += piece
        except ConnectionError:
            pass
    return answer


def is_whole(answer: bytes) -> bool:
    """Whether there is an answer with all of the body that its head promises."""
    start, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    if start.startswith(b"HTTP/1.1 100"):
        return is_whole(body)
    for line in start.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return len(body) >= int(value)
    return False


def status_of(answer: bytes) -> int:
    """The status of an answer; 0 if there is none."""
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.") else 0


def body_of(answer: bytes) -> bytes:
    """What follows the head."""
    return answer.partition(b"\r\n\r\n")[2]


@contextmanager
def everything_logged() -> Iterator[io.StringIO]:
    """What any logger of this process says meanwhile, from DEBUG on, with tracebacks, before anything is masked."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s %(args)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield said
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
