"""The tenants of a daemon, each with a token, a salt, and shares of the tiers of its own.

A tenant's pages lie in stores of its own, cut to its quota; so one tenant can neither see nor evict what another
stored, and its statistics are its own. In Redis, which all tenants share, the salt in every block hash keeps them
apart. Clients on the unix socket, and on loopback where no tokens are configured, are the tenant LOCAL.

The file is TOML, and nobody else's to read (kvstore/ownership.py):

    [[tenant]]
    name = "blue"
    token = "at least 16 characters"
    host_bytes = "2GiB"      # its share of host memory
    disk_bytes = "20GiB"     # and of lower tiers, each by its name; 0 is none of it
    redis_bytes = "50GiB"    # of a server for all machines together; without it maxmemory is the bound
    redis = true             # false: its pages do not go there
    operator = false         # may see all tenants' metrics, and attach, detach and resize tiers
"""

from __future__ import annotations

import hashlib
import hmac
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.ownership import read_secret
from kvstore.tiers import registry
from kvstore.units import parse_bytes

_toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

MIN_TOKEN = 16  # characters
HOST_BYTES = "host_bytes"
MAX_TENANTS = 1024


@dataclass(frozen=True, slots=True)
class Tenant:
    """One user of the daemon.

    name:       also the name of its directory below the disk tier's.
    salt:       part of all its block hashes; "" only for LOCAL.
    host_bytes: its share of host memory; None is what the configuration gives.
    tier_bytes: its shares of lower tiers, by name; those that are not there are what the configuration gives.
    without:    tiers that its pages do not go to.
    is_operator: may see all tenants' metrics, and attach, detach and resize tiers.
    """

    name: str
    salt: str = ""
    host_bytes: int | None = None
    tier_bytes: tuple[tuple[str, int], ...] = ()
    without: frozenset[str] = frozenset()
    is_operator: bool = False

    def uses(self, tier: str) -> bool:
        """True if its pages go to a lower tier."""
        return tier not in self.without

    def bytes_in(self, tier: str) -> int | None:
        """Return its share of a lower tier; None is what the configuration gives."""
        return dict(self.tier_bytes).get(tier)


LOCAL = Tenant("local", is_operator=True)


class Tokens:
    """Which token is whose. Immutable; any thread."""

    def __init__(self, pairs: Sequence[tuple[str, Tenant]]) -> None:
        # Digests are compared: of one length whatever the token, and none stays in memory in the clear.
        self._digests = [(_digest(token), tenant) for token, tenant in pairs]

    def find(self, token: str) -> Tenant | None:
        """The tenant of a token. Takes the same time whether and where it is found."""
        given, found = _digest(token), None
        for digest, tenant in self._digests:
            if hmac.compare_digest(given, digest):
                found = tenant
        return found

    @property
    def digests(self) -> list[bytes]:
        """SHA-256 of every token, for what must never be logged."""
        return [digest for digest, _ in self._digests]

    @property
    def tenants(self) -> list[Tenant]:
        """All tenants, each once."""
        return list(dict.fromkeys(tenant for _, tenant in self._digests))


def read_tokens(path: Path) -> Tokens:
    """Read the tenants' file. Raises ConfigError naming the entry and field."""
    name = f"service.tokens_file {path}"
    data = read_secret("service.tokens_file", path)
    try:
        value = _toml.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, _toml.TOMLDecodeError) as error:
        raise ConfigError(f"{name}: {error}") from None
    entries = value.get("tenant")
    if set(value) != {"tenant"} or not isinstance(entries, list) or not 1 <= len(entries) <= MAX_TENANTS:
        raise ConfigError(f"{name}: it must hold 1 to {MAX_TENANTS} [[tenant]] tables and nothing else")
    pairs = [_entry(f"{name}: tenant {index + 1}", entry) for index, entry in enumerate(entries)]
    for what, values in (("names", [t.name for _, t in pairs]), ("tokens", [token for token, _ in pairs])):
        if len(set(values)) < len(values):
            raise ConfigError(f"{name}: two tenants have one of their {what} in common")
    secrets = {token for token, _ in pairs}
    for index, (_, tenant) in enumerate(pairs):
        if tenant.name in secrets:
            raise ConfigError(f"{name}: tenant {index + 1}: name is a token, and names are shown; choose another")
    _check_salts(name, [tenant for _, tenant in pairs])
    return Tokens(pairs)


def _check_salts(where: str, tenants: Sequence[Tenant]) -> None:
    """Refuse salts that would let two tenants meet in Redis, now or when one of them gives its salt up."""
    names = {tenant.name: tenant for tenant in tenants}
    seen: dict[str, Tenant] = {}
    for tenant in tenants:
        other = seen.setdefault(tenant.salt, tenant)
        if other is tenant:
            other = names.get(tenant.salt, tenant)
        if other is not tenant:
            raise ConfigError(
                f"{where}: tenants {other.name!r} and {tenant.name!r} would share a salt, and so each other's pages in "
                f"Redis: no two may have the same salt, nor one the other's name as its salt (a tenant without a salt "
                f"has its name)"
            )


_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "token": (str,),
    "salt": (str,),
    HOST_BYTES: (int, str),
    "operator": (bool,),
}
_BYTES = "_bytes"


def _fields() -> dict[str, tuple[type, ...]]:
    """The fields of an entry: for each kind of tier whether it is used, and how much of it."""
    fields = dict(_FIELDS)
    for tier in registry.names():
        fields |= {tier: (bool,), tier + _BYTES: (int, str)}
    return fields


def _entry(where: str, entry: Any) -> tuple[str, Tenant]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: it must be a table")
    fields = _fields()
    for field, value in entry.items():
        kinds = fields.get(field)
        if kinds is None:
            raise ConfigError(f"{where}: {_shown(field)} is not known; known are {', '.join(fields)}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{where}: {field} must be {' or '.join(kind.__name__ for kind in kinds)}")
    name, token = entry.get("name", ""), entry.get("token", "")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name) or name == LOCAL.name:
        raise ConfigError(
            f"{where}: name is {_shown(name)}; it must be a word of a-z, 0-9, - and _, and not {LOCAL.name!r}"
        )
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"{where}: token has {len(token)} characters; it must have at least {MIN_TOKEN}")
    sizes = {tier: size for tier in registry.names() if (size := _size(where, tier + _BYTES, entry)) is not None}
    return token, Tenant(
        name,
        entry.get("salt") or name,
        _size(where, HOST_BYTES, entry),
        tuple((tier, size) for tier, size in sizes.items() if size),
        frozenset(tier for tier in registry.names() if not entry.get(tier, True) or sizes.get(tier) == 0),
        entry.get("operator", False),
    )


def _size(where: str, field: str, entry: dict[str, Any]) -> int | None:
    if field not in entry:
        return None
    try:
        size = parse_bytes(entry[field])
    except (ValueError, TypeError) as error:
        reason = str(error).replace(repr(entry[field]), "it").replace(str(entry[field]), "it")
        raise ConfigError(f"{where}: {field} is {_shown(entry[field])}; {reason}") from None
    if not isinstance(size, int) or size < 0 or (field != "disk_bytes" and size == 0):
        raise ConfigError(f"{where}: {field} is {_shown(entry[field])}; it must be a size such as '2GiB'")
    return size


def _shown(value: Any) -> str:
    """A value of the file for a message. What is long enough for a token may be one that is in the wrong place."""
    text = str(value)
    if len(text) < MIN_TOKEN:
        return repr(value)
    return f"a text of {len(text)} characters (SHA-256 {_digest(text).hex()[:8]}...)"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
