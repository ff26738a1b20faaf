"""The kinds of values that settings have: how each may be written, and what is right about it.

A validator raises ValueError with the end of a sentence that begins with the field and its value ("host.ttl_s is -1
(from ...); it must be ..."): see sources.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Ge
from pydantic import AfterValidator, BeforeValidator, Field

from kvstore.config import paths
from kvstore.errors import ConfigError
from kvstore.units import parse_bytes, parse_seconds


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return value


def _off_when_empty(value: object) -> object:
    # TOML has no null and an environment variable only text, yet a lower source's value must be possible to switch off.
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "off") else value


def known_policy(name: str) -> str:
    """Refuse an eviction policy that nobody brings."""
    from kvstore.policies import find_policy

    try:
        find_policy(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return name


def check_admit(admit: str, policy: str) -> str:
    """Refuse admission by forecast where the tier's policy has none."""
    from kvstore.policies import can_forecast, forecasting

    if admit == "predicted" and not can_forecast(policy):
        found = ", ".join(forecasting()) or "none that is installed"
        raise ValueError(f"policy {policy} has no forecast; it needs one that has: {found}")
    return admit


def _plain_word(text: str) -> str:
    if not re.fullmatch(r"[!-z|~]{1,64}", text):
        raise ValueError("it must be 1 to 64 printable ASCII characters, without spaces and braces")
    return text


def _host_names(names: str | None) -> str | None:
    for name in (names or "x").split(","):
        if not re.fullmatch(r"[A-Za-z0-9.:_-]+", name):
            raise ValueError("it must be names or addresses without ports, by commas, such as node,10.0.0.5")
    return names


def _times_by_word(given: object) -> object:
    """Read {"tool_use": "5min"}, or the same as text: "tool_use=5min, end_turn=1h"."""
    right = 'it must be times by word, such as { tool_use = "5min", end_turn = "1h" } or "tool_use=5min, end_turn=1h"'
    if given is None or (isinstance(given, str) and given.strip().lower() in ("", "none", "off", "{}")):
        return {}
    if isinstance(given, str):
        pairs = [part.partition("=") for part in given.split(",") if part.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(right)
        given = {word.strip(): time.strip() for word, _, time in pairs}
    if not isinstance(given, Mapping) or not all(isinstance(word, str) and word for word in given):
        raise ValueError(right)
    times = {word: parse_seconds(time) for word, time in given.items()}
    if not all(0 < seconds < inf for seconds in times.values()):
        raise ValueError(f"{right}; each of them more than 0 s")
    return times


def daemon_url(url: str) -> str:
    """Return the URL of a daemon's socket on this machine, written out; refuse any other."""
    url = url.strip()
    if urlsplit(url).scheme in ("http", "https"):
        raise ValueError(
            "a daemon's memory cannot be mapped over a network, and machines share by Redis: write "
            "unix:///path/of/socket of this machine's daemon, and give the daemons of all machines the same redis.url"
        )
    if url.startswith(("/", "~", "./")):
        raise ValueError(
            f"it is a URL, and not a path: write unix://{url if url.startswith('/') else '/path/of/socket'}"
        )
    if not url.startswith("unix:"):
        raise ValueError("it must be unix:///path/of/socket")
    rest = paths.expanded(url[len("unix:") :].removeprefix("//"))
    if not rest.startswith("/") or set("?#%") & set(rest):
        raise ValueError("it must be unix:///path/of/socket, with an absolute path, and without ?, # and %")
    return f"unix://{paths.socket(Path(rest))}"


def api_url(url: str) -> str:
    """Return the URL of a daemon's API, its unix socket or its HTTP port, written out; refuse any other."""
    url = url.strip()
    if url.startswith(("unix:", "/", "~", "./")):
        return daemon_url(url)
    parts = urlsplit(url)
    try:
        has_port = parts.port is not None
    except ValueError:
        has_port = False
    if parts.scheme in ("http", "https") and parts.hostname and has_port and parts.username is None:
        return url
    raise ValueError("it must be unix:///path/of/socket, http://host:port or https://host:port")


def _daemon_url_or_none(url: str | None) -> str | None:
    return None if url is None else daemon_url(url)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else paths.absolute(path)


def _socket(path: Path | None) -> Path | None:
    return None if path is None else paths.socket(path)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Ge(4096)]  # at least one aligned slot
Count = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(allow_inf_nan=False)]
TimesByWord = Annotated[dict[str, float], BeforeValidator(_times_by_word)]
Policy = Annotated[str, AfterValidator(known_policy)]
AdmitByUse = Literal["always", "second_use"]  # of a medium that makes room by itself
Admit = Literal["always", "second_use", "predicted"]
Codec = Literal["exact", "lossless", "near", "compact", "small"]
CODEC: Codec = Field(
    default="exact",
    description="How pages are stored: as they are; lossless (bfloat16, 1.45 times smaller; needs zstandard); or with "
    "a loss that docs/codecs.md measures: near (2 times), compact (2.4), small (3.2).",
)
OrNone = BeforeValidator(_off_when_empty)  # "none", "off" and "" stand for None
PathOrNone = Annotated[Path | None, AfterValidator(_absolute), OrNone]
SocketOrNone = Annotated[Path | None, AfterValidator(_absolute), AfterValidator(_socket), OrNone]
PlainWord = Annotated[str, AfterValidator(_plain_word)]
HostNames = Annotated[str | None, OrNone, AfterValidator(_host_names)]
DaemonUrl = Annotated[str | None, OrNone, AfterValidator(_daemon_url_or_none)]
