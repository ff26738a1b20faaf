"""What the policies of a store have learned, as files beside its pages: read at a start, written now and then.

    <directory of a tier>/learned/<tier>-<16 digits>.tables

    kvstore-policy-tables 1 <SHA-256 of what follows, in hex>\\n
    {"tier": ..., "policy": ..., "namespace": ..., "block_size": ..., "written_at": ..., "tables": {...}}

The digits are of the root of the namespace, which has the model, the layout and the tenant in it: tables are taken in
only by the policy, tier and namespace that they were learned for. A file that is anything else, or of another format,
is a start from nothing: counted and logged, never an error. Files are made whole or not at all; of several stores that
share a directory and a namespace, the last to write is the next start's teacher.

Without a tier that has a directory (host memory alone, or Redis) nothing is kept: what the process had is gone with it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from eviction.ttl import Ttl
from kvstore.errors import ConfigError
from kvstore.tiers.disk.private_files import DIRECTORY_MODE, check_directory, open_private

log = logging.getLogger(__name__)

FOLDER = "learned"
SUFFIX = ".tables"
MAGIC = b"kvstore-policy-tables"
FORMAT_VERSION = 1
NAMESPACE_DIGITS = 16
MAX_BYTES = 16 << 20  # of a file; what 1,024 classes of ours take is below 2 MiB
MAX_FILES = 64  # in a directory: namespaces come and go
LEFT_OVER_S = 3600.0  # a file that was not finished by then was a killed process's


class Unreadable(Exception):
    """A file is not taken in. reason: broken, version or other."""

    def __init__(self, reason: str, told: str) -> None:
        super().__init__(told)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class PolicyTables:
    """The content of a file. written_at: Unix time."""

    tier: str
    policy: str
    namespace: str
    block_size: int
    written_at: float
    tables: dict[str, Any]

    def __post_init__(self) -> None:
        """Raise TypeError for what another program may have written."""
        texts = (self.tier, self.policy, self.namespace)
        numbers = (self.block_size, self.written_at)
        if not (all(isinstance(text, str) for text in texts) and isinstance(self.tables, dict)) or not all(
            isinstance(number, (int, float)) for number in numbers
        ):
            raise TypeError("a field is of another kind")


class Learned:
    """The files of one store. `restore` before the store is used; `write` by one thread at a time.

    num_written, num_failed: files. unread: those that were not taken in, by reason.
    """

    def __init__(
        self, directory: Path, namespace: str, block_size: int, *, now: Callable[[], float] = time.time
    ) -> None:
        """directory: of a tier, and there. namespace: its root in hex."""
        self.num_written = self.num_failed = 0
        self.unread: Counter[str] = Counter()
        self._folder = directory / FOLDER
        self._namespace = namespace[:NAMESPACE_DIGITS]
        self._block_size = block_size
        self._now = now
        self._last: dict[str, bytes] = {}  # a hash of what was written, by tier
        self._is_failing = False

    def restore(self, tier: str, policy: Ttl[Any]) -> bool:
        """Have a policy go on with what one like it had learned; False where it begins with nothing."""
        if policy.learner is None:
            return False
        path = self._path(tier)
        try:
            found = read_tables(path)
            ours = (tier, policy.name, self._namespace, self._block_size)
            theirs = (found.tier, found.policy, found.namespace, found.block_size)
            if theirs != ours:
                raise Unreadable("other", f"they are of {theirs}, not of {ours}")
            try:
                policy.learner.restore(found.tables)
            except Exception as error:  # somebody else's policy may raise anything
                raise Unreadable("broken", f"{type(error).__name__}: {error}") from error
        except FileNotFoundError:
            return False
        except (Unreadable, OSError, ConfigError) as error:
            self.unread[error.reason if isinstance(error, Unreadable) else "broken"] += 1
            log.warning("%s is not taken in, %s of tier %s begins to learn anew: %s", path, policy.name, tier, error)
            return False
        log.info("%s of tier %s goes on with what was learned in %s", policy.name, tier, path)
        return True

    def write(self, learned: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        """Write what has changed. learned: by tier, the policy's name and its tables. Blocks; raises nothing."""
        for tier, (policy, tables) in learned.items():
            try:
                what = PolicyTables(tier, policy, self._namespace, self._block_size, self._now(), tables)
                text = json.dumps(tables, allow_nan=False, separators=(",", ":"), default=_plain)
                digest = sha256(text.encode()).digest()
                if digest == self._last.get(tier):
                    continue
                self._make_folder()
                _write(self._path(tier), what, text)
                self._last[tier] = digest
                self.num_written += 1
                self._is_failing = False
            except Exception as error:
                # It is never worth a request, and tables are somebody else's where the policy is.
                self.num_failed += 1
                if not self._is_failing:
                    log.warning("%s cannot be written: %s; what is learned ends with us", self._path(tier), error)
                self._is_failing = True

    def _path(self, tier: str) -> Path:
        return self._folder / f"{tier}-{self._namespace}{SUFFIX}"

    def _make_folder(self) -> None:
        self._folder.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        check_directory(self._folder, may_be_link=False)
        for left in self._folder.glob("*.new"):
            if self._now() - left.stat().st_mtime > LEFT_OVER_S:
                left.unlink(missing_ok=True)
        files = sorted(self._folder.glob("*" + SUFFIX), key=lambda path: path.stat().st_mtime)
        for oldest in files[: max(0, len(files) - MAX_FILES)]:
            oldest.unlink(missing_ok=True)


def files_in(directory: Path) -> list[Path]:
    """Return the files of tables beside the pages of a directory."""
    return sorted((directory / FOLDER).glob("*" + SUFFIX))


def read_tables(path: Path, *, judge_owner: bool = True) -> PolicyTables:
    """Read a file. Raises Unreadable, OSError or ConfigError (a file that is not ours alone)."""
    fd = open_private(path, os.O_RDONLY, judge_owner=judge_owner)
    with open(fd, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    head, _, body = raw.partition(b"\n")
    words = head.split(b" ")
    if len(words) != 3 or words[0] != MAGIC or len(raw) > MAX_BYTES:
        raise Unreadable("broken", "it is no file of tables")
    if words[1] != b"%d" % FORMAT_VERSION:
        raise Unreadable("version", f"its format is {words[1]!r:.20}, this release reads {FORMAT_VERSION}")
    if words[2] != sha256(body).hexdigest().encode():
        raise Unreadable("broken", "it does not fit its checksum")
    try:
        return PolicyTables(**json.loads(body))
    except (ValueError, TypeError, RecursionError) as error:
        raise Unreadable("broken", f"{type(error).__name__}: {error}") from None


def _write(path: Path, what: PolicyTables, tables: str) -> None:
    """Write a file whole or not at all; its owner's alone, as the callers' words for ends of replies are in it."""
    fields = {name: getattr(what, name) for name in PolicyTables.__slots__ if name != "tables"}
    body = f'{json.dumps(fields, allow_nan=False)[:-1]}, "tables": {tables}}}'.encode()
    raw = b"%s %d %s\n%s" % (MAGIC, FORMAT_VERSION, sha256(body).hexdigest().encode(), body)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"the tables take {len(raw)} bytes; a policy may have {MAX_BYTES}")
    written = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        with open(open_private(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)
    except BaseException:
        with suppress(OSError):
            written.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """Arrays as lists, for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not for JSON")
