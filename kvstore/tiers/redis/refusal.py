"""Error replies: which concern one key, and which refuse a kind of command, in words that an operator can act on.

A server that answers with an error is there. So an error reply is TierRefused and judges the direction of its call,
no other: a replica refuses writes and is read, an account may be allowed to store and not to delete. What
breaks a connection is TierUnavailable, and raised by the wire.

    MOVED                 the cluster has changed: SlotMoved, and the call is repeated with a new table
    ASK, TRYAGAIN         a slot is on its way to another node: its pages count as not there
    OOM                   an answer; the caller counts it
    everything else       TierRefused, whose reason is the first word of the reply
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from redis.exceptions import AskError, MovedError, NoPermissionError, ResponseError, TryAgainError

from kvstore.errors import TierRefused

Reply = Any  # as in redis_parser

OOM = "OOM"
NOPERM = "NOPERM"
UNKNOWN = "UNKNOWN_COMMAND"
# After these the server may be the wrong one by now (a failover): connections and tables are made anew.
STALE = frozenset({"READONLY", "CLUSTERDOWN", "MASTERDOWN", "LOADING"})
# The server does nothing for anybody: PING says so too.
BUSY = frozenset({"LOADING", "BUSY", "MASTERDOWN"})

# What the tier sends, and what its scripts call.
COMMANDS = (
    *("exists", "mget", "getrange", "watch", "unwatch"),
    *("set", "multi", "exec", "touch", "pexpire", "unlink", "ping", "scan"),
    *("eval", "get", "del"),
)
OF_A_BOUND = ("zadd", "zrem", "zcard", "zcount", "zrangebyscore", "zremrangebyscore")

# Redis 7.0, and Valkey: they have no code for it.
_IN_A_SCRIPT = ("user executing the script can't", "ACL failure in script")

_ADVICE = {
    "READONLY": "it is a replica: point redis.url at the master, or use redis+sentinel:// or redis+cluster://",
    "MISCONF": 'it could not save its data set; for a cache set `save ""`, or `stop-writes-on-bgsave-error no`',
    "NOREPLICAS": "it has fewer good replicas than min-replicas-to-write asks for",
    "CLUSTERDOWN": "slots without a master: see CLUSTER INFO",
    "MASTERDOWN": "a replica that has lost its master and may not answer from old data (replica-serve-stale-data)",
    "LOADING": "it is reading its data set; it answers when that is done",
    "BUSY": "a script holds it: see SCRIPT KILL",
}


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the server knows us as, for what to tell its operator.

    user:    of the URL, or default.
    pattern: matches the keys we use, in an ACL's language.
    extra:   commands beside COMMANDS that are needed here.
    """

    user: str = "default"
    pattern: str = "*"
    extra: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """The command that allows the account everything it needs."""
        commands = " ".join(f"+{name}" for name in (*COMMANDS, *OF_A_BOUND, *self.extra))
        return f"ACL SETUSER {self.user} ~{self.pattern} {commands}"


class SlotMoved(Exception):
    """The cluster has given a slot to another node."""

    def __init__(self, error: MovedError) -> None:
        super().__init__(str(error))
        self.address: tuple[str, int] = (error.host, error.port)


def code_of(error: ResponseError) -> str:
    """The first word of an error reply where it is a code, else ERR; UNKNOWN_COMMAND for one that is not known."""
    code = getattr(error, "status_code", None) or str(error).split(" ")[0]
    if re.match(r"(ERR )?unknown (sub)?command", str(error), re.IGNORECASE):
        return UNKNOWN
    if any(told in str(error) for told in _IN_A_SCRIPT):
        return NOPERM
    return code if re.fullmatch(r"[A-Z]{2,20}", code) else "ERR"


def words(error: ResponseError, account: Account) -> str:
    """The server's words, and the remedy."""
    code = code_of(error)
    text = str(error) if str(error).startswith(code) or code == UNKNOWN else f"{code} {error}"
    if code == NOPERM:
        return f"{_what_is_missing(str(error), account)} ({text}); allow it: {account.rule}"
    if code == UNKNOWN:
        found = re.search(r"['`]([\w|-]+)['`]", text)
        name = found[1].upper() if found else "a command"
        return f"it does not know {name} ({text}): renamed or disabled (rename-command), or left out by a proxy"
    advice = _ADVICE.get(code)
    return f"{text}; {advice}" if advice else text


def is_moving(reply: Reply) -> bool:
    """True for a key whose slot is on its way from one node to another."""
    return isinstance(reply, AskError | TryAgainError) and not isinstance(reply, MovedError)


def checked(reply: Reply, where: str, account: Account) -> Reply:
    """Pass a reply on; raise SlotMoved or TierRefused for what concerns more than one key."""
    if not isinstance(reply, ResponseError) or is_moving(reply):
        return reply
    if isinstance(reply, MovedError):
        raise SlotMoved(reply)
    raise TierRefused(f"redis {where}: {words(reply, account)}", code_of(reply))


def is_denied(reply: Reply) -> bool:
    """True if this account, or this server for everybody, leaves out the command: others may be done."""
    return isinstance(reply, ResponseError) and (isinstance(reply, NoPermissionError) or code_of(reply) == UNKNOWN)


def _what_is_missing(text: str, account: Account) -> str:
    if any(told in text for told in _IN_A_SCRIPT):
        return f"the account {account.user!r} may not do what our script does (GET, SET and DEL of {account.pattern})"
    command = re.search(r"'([\w|-]+)'(?: command| subcommand)?", text)
    if command is not None:
        return f"the account {account.user!r} may not run {command[1].upper()}"
    if "key" in text:
        return f"the account {account.user!r} may not use the keys {account.pattern}"
    return f"the account {account.user!r} lacks a permission"
