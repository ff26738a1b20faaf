"""Brings a cluster up, stands by it, and takes it down.

    start   stage by stage: what needs nothing first; each process is waited for until it answers that it is ready
    stand   until Ctrl-C, SIGTERM or SIGHUP; a process that ends is told of, and nothing is done about it
    stop    the other way round: the router first, Redis last, so that everybody can give what it owes to those below

`up` and `down` are different runs of the program: what one leaves, the other finds in the run directory
(`supervisor_directory`), also when the first was killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from kvstore.cluster.supervisor_directory import ClusterError, RunDirectory
from kvstore.cluster.supervisor_ports import holder, is_ready, redis_is_ready
from kvstore.cluster.topology import AUTO, ClusterSpec, Process, ProcessKind, plan
from kvstore.testing.redis_server import RedisNotInstalled, find_redis_server

EXIT_TIMEOUT_S = 1.0  # from a process that is seen no more to its exit code
START_TIMEOUT_S = 300.0  # imports and loading: 10 s here, minutes for a large model on a cold disk
STOP_TIMEOUT_S = 60.0  # a replica finishes what it runs (30 s), a node drains and flushes
STEP_S = 0.1
STAND_STEP_S = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Say = Callable[[str], None]


class Ended(Exception):
    """Somebody asked us to end."""


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """How one process is.

    state:     "ready", "not ready" (it runs, and does not say that it is ready) or "ended".
    rss_bytes: resident memory; replicas of a node count the pages of its slab that they have touched too.
    """

    name: str
    state: str
    url: str
    pid: int | None = None
    rss_bytes: int | None = None


class Supervisor:
    """One cluster, seen from a run of the program. Not thread-safe.

    say: takes one line of progress.
    """

    def __init__(self, spec: ClusterSpec, directory: RunDirectory, say: Say = lambda _: None) -> None:
        """Starts nothing. Raises ConfigError."""
        self.spec = spec
        self.directory = directory
        self.processes = plan(spec, directory.path, _redis_server)
        self._tell = say
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    # ---- up -------------------------------------------------------------------------------------------------------

    def check_ports(self, names: Sequence[str] | None = None) -> None:
        """Raise ClusterError if a port is taken, naming which, for what and by whom."""
        chosen = [process for process in self.processes if names is None or process.name in names]
        taken = [(process, who) for process in chosen if (who := holder(process.port)) is not None]
        if taken:
            lines = [f"port {process.port}, for {process.name}, is in use by {who}" for process, who in taken]
            raise ClusterError("\n".join([*lines, "end what uses it, or give another --port (0 takes any free ones)"]))

    def start(self, names: Sequence[str] | None = None, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start all processes, or those named, and wait until each is ready.

        Raises ClusterError if one ends or is not ready in time; what was started then still runs.
        """
        began = time.monotonic()
        waiting = [process for process in self.processes if names is None or process.name in names]
        wanted = {process.name for process in waiting}
        starting: list[Process] = []
        while waiting or starting:
            able = [one for one in waiting if not wanted & set(one.needs)]
            if loading := [one.name for one in able if one.kind is ProcessKind.REPLICA]:
                self._say(f"loading the model: {', '.join(loading)}")  # what takes longest
            for process in able:
                waiting.remove(process)
                self._children[process.name] = self.directory.spawn(process, _environment())
                starting.append(process)
            for process in list(starting):
                if self._is_ready(process):
                    starting.remove(process)
                    wanted.remove(process.name)
                    self._say(f"{process.name:<10} ready after {time.monotonic() - began:4.1f} s   {process.url}")
                elif (code := self._children[process.name].poll()) is not None:
                    raise ClusterError(self._failure(process, f"ended {_how(code)} before it was ready"))
                elif time.monotonic() - began > timeout_s:
                    raise ClusterError(self._failure(process, f"is not ready after {timeout_s:.0f} s"))
            if starting:
                time.sleep(STEP_S)

    def stand(self) -> None:
        """Return when nobody runs any more; tell of each process that ends. `interruptible` ends it too."""
        alive = {process.name for process in self.processes}
        while alive:
            now = set(self.directory.running())
            for name in sorted(alive - now):
                how = f" {_how(code)}" if (code := self._exit_code(name)) is not None else ""
                again = f"kvstore cluster restart --name {self.spec.name} {name}"
                self._say(f"{name} ended{how}; its log is {self.directory.log(name)}; to start it again: {again}")
            for name in sorted(now - alive):
                self._say(f"{name} is back")
            alive = now
            time.sleep(STAND_STEP_S)

    def _exit_code(self, name: str) -> int | None:
        """How a process ended that this object started; it takes the kernel a moment to tell."""
        child = self._children.pop(name, None)  # who is back was started by somebody else
        if child is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            return child.wait(EXIT_TIMEOUT_S)
        return None

    # ---- down -------------------------------------------------------------------------------------------------------

    def stop(self, names: Sequence[str] | None = None, *, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """End all processes, or those named, each kind in its turn; how many there were."""
        count = 0
        for kind in (ProcessKind.ROUTER, ProcessKind.REPLICA, ProcessKind.NODE, ProcessKind.REDIS):
            chosen = [one.name for one in self.processes if one.kind is kind and (names is None or one.name in names)]
            found = {name: process for name in chosen if (process := self.directory.find(name)) is not None}
            count += len(found)
            for process in found.values():
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
                    process.resume()  # a stopped process would hear of it only then
            until = time.monotonic() + timeout_s
            while left := [name for name in found if self._is_running(name)]:
                if time.monotonic() > until:
                    self._say(f"{', '.join(left)} did not end within {timeout_s:.0f} s and is killed")
                    for name in left:
                        self._kill(found[name])
                    until = time.monotonic() + timeout_s
                time.sleep(STEP_S)
        return count

    def _is_running(self, name: str) -> bool:
        child = self._children.get(name)
        if child is not None:
            child.poll()  # ours: it stays a zombie until somebody asks
        return self.directory.find(name) is not None

    def _kill(self, process: psutil.Process) -> None:
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a session: its children go with it

    # ---- looking ----------------------------------------------------------------------------------------------------

    def status(self) -> list[ProcessStatus]:
        """How each process is, in the order in which they start."""
        rows = []
        for process in self.processes:
            row = ProcessStatus(process.name, "ended", process.url)
            found = self.directory.find(process.name)
            with suppress(psutil.NoSuchProcess):  # it may end while we look
                if found is not None:
                    state = "ready" if self._is_ready(process) else "not ready"
                    row = ProcessStatus(process.name, state, process.url, found.pid, found.memory_info().rss)
            rows.append(row)
        return rows

    def _is_ready(self, process: Process) -> bool:
        # Somebody else may listen on the port of a process that has ended.
        if self.directory.find(process.name) is None:
            return False
        return redis_is_ready(process.port) if process.kind is ProcessKind.REDIS else is_ready(process.port)

    def _say(self, line: str) -> None:
        with suppress(OSError):  # of a terminal that is gone: what is to be done is done all the same
            self._tell(line)

    def _failure(self, process: Process, what: str) -> str:
        log = self.directory.log(process.name)
        return f"{process.name} {what}; the end of its log, {log}:\n{self.directory.last_words(process.name)}"


@contextmanager
def brought_up(
    spec: ClusterSpec, directory: RunDirectory, say: Say = lambda _: None, *, timeout_s: float = START_TIMEOUT_S
) -> Iterator[Supervisor]:
    """A running cluster for a block, and after it; unless the block raises, which ends the cluster.

    After `Ended` nothing is left; after anything else, such as a process that does not come up, the logs are.
    Raises ClusterError or ConfigError; nothing runs then.
    """
    with directory.lock(os.getpid()) as pid:
        if pid is not None or directory.running():
            option = f"--name {directory.name}"
            raise ClusterError(
                f"cluster {directory.name!r} is up already; look at it: kvstore cluster status {option}; "
                f"end it: kvstore cluster down {option}; or give the new one another --name"
            )
        if spec.redis == AUTO:
            _check_redis_server()
        supervisor = Supervisor(spec, directory, say)
        supervisor.check_ports()
        directory.create(spec)
        try:
            supervisor.start(timeout_s=timeout_s)
            yield supervisor
        except Ended:
            supervisor._say("ending the cluster")
            supervisor.stop()
            _remove(directory)
            raise
        except BaseException:
            supervisor.stop()
            directory.forget()
            raise


def take_down(directory: RunDirectory, say: Say = lambda _: None) -> int:
    """End everything of a cluster, however its `up` ended, and delete its directory; how many processes there were.

    An `up` that still stands by it is asked to end first, and does the work itself.
    """
    count = len(directory.running())
    with directory.lock(0) as pid:
        if pid:
            _ask_to_end(pid, directory)
    with directory.lock(0) as pid:
        if pid is not None:
            raise ClusterError(f"another command is busy with cluster {directory.name!r}; try again when it is done")
        spec = directory.read()
        if spec is not None:
            Supervisor(spec, directory, say).stop()
        _remove(directory)
    return count


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Ended`, which ends the block and no more.

    Once: what is done about it on the way out is not interrupted again.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Ended

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        with suppress(Ended):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- private --------------------------------------------------------------------------------------------------------


def _redis_server() -> str:
    """Its path; its name where it is gone, since what runs can be ended all the same."""
    try:
        return find_redis_server()
    except RedisNotInstalled:
        return "redis-server"


def _check_redis_server() -> None:
    try:
        find_redis_server()
    except RedisNotInstalled as error:
        raise ClusterError(f"{error}; or go without Redis: --redis none") from None


def _remove(directory: RunDirectory) -> None:
    """Delete the directory; what a start that was cut short has left is killed."""
    while left := directory.remove():
        for process in left.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(STEP_S)


def _ask_to_end(pid: int, directory: RunDirectory) -> None:
    """Tell the `up` with this pid to take the cluster down; kill it if it takes too long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        until = time.monotonic() + 2 * STOP_TIMEOUT_S
        while time.monotonic() < until:
            with directory.lock(0) as holder:
                if holder != pid:
                    return
            time.sleep(STEP_S)


def _environment() -> dict[str, str]:
    """Ours, without settings of a store: what the cluster is made of is on its command line."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    # This very package, also in a checkout that is not installed.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), kept.get("PYTHONPATH", "")]))
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
