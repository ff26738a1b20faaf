"""A cluster's run directory: what was asked for, who runs, and what they said.

    NAME.lock             held by the `up` that is starting the cluster or standing by it; has its pid
    NAME/cluster.json     the ClusterSpec, whole before the first process starts; may hold a password, so ours alone
    NAME/replica-0.pid    written by the process itself, before it becomes what it is to be
    NAME/replica-0.log    what it prints
    NAME/replica-0.engine.log  and what the engine's own server prints, where there is one
    NAME/node-0.sock      sockets

The hard thing: `up` may be killed at any moment, and `down` must end exactly what it started. So a process writes its
pid itself: a shell does, and then turns into the program, so there is no moment at which it runs and nobody knows. And
a pid counts only while that process works in this directory: a number that the system has given to somebody else since
is never ours.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from kvstore.cluster.topology import ClusterSpec, Process, engine_log
from kvstore.errors import KVStoreError

# If the directory is gone when it comes to write, the cluster is gone too: then nothing is started.
STUB = 'echo $$ > "$0" && exec "$@"'
SPEC = "cluster.json"
SPEC_JSON = TypeAdapter(ClusterSpec)
LOG_LINES = 12


class ClusterError(KVStoreError):
    """The cluster cannot be brought up, or is not there. The message says what to do next."""


def default_parent() -> Path:
    """The place of run directories: `$XDG_STATE_HOME/kvstore/clusters`, else `~/.local/state/kvstore/clusters`."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "kvstore" / "clusters"


class RunDirectory:
    """The files of the cluster `name`. Any process; one at a time may hold the lock."""

    def __init__(self, parent: Path, name: str) -> None:
        self.parent = parent.expanduser().absolute()
        self.name = name
        self.path = self.parent / name

    @classmethod
    def all(cls, parent: Path) -> list[RunDirectory]:
        """Every cluster that has been brought up and not taken down, by name."""
        found = sorted(path.parent.name for path in parent.expanduser().glob(f"*/{SPEC}"))
        return [cls(parent, name) for name in found]

    # ---- the spec -----------------------------------------------------------------------------------------------

    def create(self, spec: ClusterSpec) -> None:
        """Start with an empty directory and the spec in it. Only with the lock, and nothing running."""
        self.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(mode=0o700)
        partial = self.path / f"{SPEC}.partial"
        partial.write_bytes(SPEC_JSON.dump_json(spec))
        partial.chmod(0o600)
        partial.rename(self.path / SPEC)

    def read(self) -> ClusterSpec | None:
        """The specification of the cluster; None if there is no such cluster, or another version wrote it."""
        try:
            return SPEC_JSON.validate_json((self.path / SPEC).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def forget(self) -> None:
        """Keep the logs, but as those of a cluster that is no more."""
        (self.path / SPEC).unlink(missing_ok=True)

    # ---- processes ------------------------------------------------------------------------------------------------

    def spawn(self, process: Process, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, so that it hears nothing of what is typed here; its pid is known."""
        pid_file = self._pid_file(process.name)
        pid_file.unlink(missing_ok=True)
        with self.log(process.name).open("ab") as log:
            child = subprocess.Popen(
                ["/bin/sh", "-c", STUB, str(pid_file), *process.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.path,
                env={**environment, **process.environment},
                start_new_session=True,
            )
        while child.poll() is None and not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.002)
        return child

    def find(self, name: str) -> psutil.Process | None:
        """The running process `name`, or None."""
        with suppress(FileNotFoundError, ValueError, psutil.Error):
            found = psutil.Process(int(self._pid_file(name).read_text()))
            if found.status() != psutil.STATUS_ZOMBIE and Path(found.cwd()) == self.path.resolve():
                return found
        return None

    def running(self) -> dict[str, psutil.Process]:
        """All running processes, by name."""
        names = [path.stem for path in sorted(self.path.glob("*.pid"))]
        return {name: found for name in names if (found := self.find(name)) is not None}

    def log(self, name: str) -> Path:
        """The file for a process' standard output and error."""
        return self.path / f"{name}.log"

    def last_words(self, name: str) -> str:
        """The end of a log, and of that of its engine's own server, indented."""
        lines = ["(there is none)"]
        with suppress(FileNotFoundError):
            lines = self.log(name).read_text(errors="replace").splitlines()[-LOG_LINES:] or ["(it is empty)"]
        with suppress(FileNotFoundError):
            text = engine_log(self.path, name).read_text(errors="replace")
            lines += [f"the end of {engine_log(self.path, name)}:", *text.splitlines()[-LOG_LINES:]]
        return "\n".join(f"    {line}" for line in lines)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def remove(self) -> dict[str, psutil.Process]:
        """Delete it all, unless somebody runs: what still did is returned, and nothing is deleted.

        1. An `up` is killed just after it started a process, which has not yet written its pid.
        2. We see nobody, and would delete the directory.
        3. The process writes its pid, and runs for ever.
        So the directory is moved away before the last look. Whoever writes after that finds no directory, and ends.
        """
        if not self.path.is_dir():
            return {}
        aside = RunDirectory(self.parent, f".{self.name}.gone")
        shutil.rmtree(aside.path, ignore_errors=True)
        self.path.rename(aside.path)
        running = aside.running()
        if running:
            aside.path.rename(self.path)
            return running
        shutil.rmtree(aside.path, ignore_errors=True)
        return {}

    @contextmanager
    def lock(self, pid: int) -> Iterator[int | None]:
        """Hold the lock, noting `pid` as its holder's; yields None, or the pid of who has it (0: not known)."""
        self.parent.mkdir(parents=True, exist_ok=True)
        with open(self.parent / f"{self.name}.lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                yield int(file.read() or 0)
                return
            file.truncate(0)
            file.write(str(pid))
            file.flush()
            try:
                yield None
            finally:
                file.truncate(0)

    def _pid_file(self, name: str) -> Path:
        return self.path / f"{name}.pid"
