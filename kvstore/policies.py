"""Eviction policies by name, of ours and of whoever brings one.

    lru, outlook, s3fifo, sieve  our own (eviction/)
    a name                     an entry point of the group `kvtiers.policies`, or `register_policy` in this process
    package.module:Class       a class, or a function without arguments that returns a new policy

A policy of somebody else's is made once when it is looked up, and looked at, so that one without a method is told with
the configuration and not in the middle of a request.
"""

from __future__ import annotations

import re
from typing import Any

from eviction.forecast import has_forecast
from eviction.policy import EvictionPolicy
from eviction.registry import POLICIES, PolicyFactory
from eviction.ttl import Ttl
from kvstore.errors import ConfigError
from kvstore.plugins import Plugin, Plugins, missing_members

GROUP = "kvtiers.policies"
# As pyproject.toml has them.
OURS = {
    "lru": "eviction.lru:Lru",
    "outlook": "eviction.outlook:Outlook",
    "s3fifo": "eviction.s3fifo:S3Fifo",
    "sieve": "eviction.sieve:Sieve",
}

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def _checked(name: str, found: object) -> PolicyFactory:
    if not callable(found):
        raise TypeError(f"is {type(found).__name__}; it must be a class, or a function that returns a policy")
    try:
        policy = found()
    except Exception as error:  # somebody else's constructor
        raise TypeError(f"cannot be made without arguments: {type(error).__name__}: {error}") from error
    lacks = missing_members(policy, EvictionPolicy)
    lacks += [name for name in ("__len__", "__contains__") if not hasattr(type(policy), name)]
    if lacks:
        raise TypeError(f"makes a {type(policy).__name__} without {', '.join(lacks)}; see eviction/policy.py")
    return found


_plugins: Plugins[PolicyFactory] = Plugins(GROUP, "eviction policy", OURS, _checked)

problems = _plugins.problems


def names() -> list[str]:
    """Return every name that can be given. Imports no plug-in."""
    return sorted({*POLICIES, *_plugins.names()})


def find_policy(name: str) -> PolicyFactory:
    """Return what makes new, empty policies of this name, or of this "package.module:Class".

    Raises ConfigError if there is none, or if it cannot be imported or is no policy: with the end of a sentence that
    begins with the setting and its value.
    """
    factory = POLICIES.get(name)
    if factory is not None:
        return factory
    if ":" in name:
        if not _PATH.fullmatch(name):
            raise ConfigError("it must be package.module:Class")
        return _plugins.load(Plugin(name, name, ""))
    found = _plugins.get(name)
    if found is None:
        raise ConfigError(f"it must be one of {', '.join(names())}, or package.module:Class")
    return found


def forecasting() -> list[str]:
    """Return the names of the policies that can tell what a copy is worth (eviction/forecast.py)."""
    return list(filter(can_forecast, names()))


def can_forecast(name: str) -> bool:
    """True if policies of this name can tell what a copy is worth. Raises ConfigError as `find_policy` does."""
    return has_forecast(find_policy(name)())


def make_policy(name: str, ttl_s: float | None = None) -> Ttl[Any]:
    """Return a new policy with deadlines on top; see `eviction.registry.make_policy`. Raises ConfigError."""
    return Ttl(find_policy(name)(), ttl_s, name)
