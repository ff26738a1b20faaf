"""Calls of a daemon's clients that move no bytes, over the round trip of a bare unix socket with an echo behind it.

Lookups of short and long prompts, known to the daemon and new to it; load leases with their ends; and many clients at
once, in processes of their own.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count

import numpy as np

from kvstore.lab.bench import Case, Table, measure
from kvstore.lab.daemon_process import BLOCK_SIZE, daemon_process, open_remote
from kvstore.plan.records import Request
from kvstore.service.client.store import RemoteStore
from kvstore.units import MiB

PAGE_BYTES = 2 * MiB
NUM_SLOTS = 160
PROMPT_BLOCKS = (16, 128, 1024)
LEASED_BLOCKS = 16
CALLS = 200  # of one kind in a turn
QUICK_CALLS = 20
CROWD_PROCESSES = 4
CROWD_THREADS = 16  # clients of each process
_ECHO_BYTES = 64
_ECHO = """
import socket, sys
end = socket.socket(fileno=int(sys.argv[1]))
while data := end.recv(4096):
    end.sendall(data)
"""
_CROWD = "import sys; from kvstore.lab.workloads.service import crowd; crowd(*sys.argv[1:])"


def run(argument: str, quick: bool) -> list[Table]:
    """Measure one client's calls, and those of many clients together."""
    calls = QUICK_CALLS if quick else CALLS
    with ExitStack() as stack:
        url, daemon = stack.enter_context(daemon_process(NUM_SLOTS * PAGE_BYTES))
        bare = stack.enter_context(_echo())
        store = stack.enter_context(open_remote(url, PAGE_BYTES))
        request = _save(store)

        def echo() -> None:
            for _ in range(calls):
                bare.sendall(bytes(_ECHO_BYTES))
                bare.recv(_ECHO_BYTES, socket.MSG_WAITALL)

        def lease() -> None:
            for _ in range(calls):
                store.complete(store.prepare_load(request, LEASED_BLOCKS))

        floor = Case("bare unix socket, an echo", echo, calls)
        cases = [floor]
        for num_blocks in PROMPT_BLOCKS:
            cases += _lookups(store, num_blocks, calls, daemon)
        cases.append(Case(f"prepare_load of {LEASED_BLOCKS} pages, complete", lease, calls, partner=daemon))
        one = measure("calls of one client", "calls", cases, quick=quick)
        ask_all = stack.enter_context(_crowd(url, calls))
        num_clients = CROWD_PROCESSES * CROWD_THREADS
        crowded = Case(f"lookups of {num_clients} clients at once", ask_all, num_clients * calls, partner=daemon)
        return [one, measure(f"calls of {num_clients} clients", "calls", [floor, crowded], quick=quick)]


def crowd(url: str, calls: str) -> None:
    """Be the clients of one process: `calls` lookups of each for every line of standard input, then answer a line."""
    with ExitStack() as stack:
        stores = [stack.enter_context(open_remote(url, PAGE_BYTES)) for _ in range(CROWD_THREADS)]
        pool = stack.enter_context(ThreadPoolExecutor(CROWD_THREADS))

        def ask(store: RemoteStore) -> None:
            request = store.request(_tokens(LEASED_BLOCKS, 0))
            for _ in range(int(calls)):
                if store.lookup(request).num_blocks != LEASED_BLOCKS:
                    raise RuntimeError("bench service: a prompt that is stored was not found")
            store.keep.finished(request)

        print(flush=True)
        for _ in sys.stdin:
            list(pool.map(ask, stores))
            print(flush=True)


def _lookups(store: RemoteStore, num_blocks: int, calls: int, daemon: int) -> list[Case]:
    known = store.request(_tokens(num_blocks, 1))
    seeds = count(2)
    fresh: list[Request] = []

    def again() -> None:
        for _ in range(calls):
            store.lookup(known)

    def meet() -> None:
        for request in fresh:
            store.keep.finished(request)
        fresh[:] = [store.request(_tokens(num_blocks, next(seeds))) for _ in range(calls)]

    def first() -> None:
        for request in fresh:
            store.lookup(request)

    return [
        Case(f"lookup, {num_blocks} blocks", again, calls, partner=daemon),
        Case(f"lookup, {num_blocks} blocks that are new to the daemon", first, calls, meet, daemon),
    ]


def _save(store: RemoteStore) -> Request:
    """Store one prompt, with whatever bytes are in its slots."""
    request = store.request(_tokens(LEASED_BLOCKS, 0))
    store.complete(store.prepare_save(request, 0, LEASED_BLOCKS))
    return request


def _tokens(num_blocks: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    # One token more than the blocks hold: an engine has to compute at least one.
    return np.random.default_rng(seed).integers(0, 50_000, num_blocks * BLOCK_SIZE + 1)


@contextmanager
def _echo() -> Iterator[socket.socket]:
    """A socket whose other end, in another process, sends back what comes."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-c", _ECHO, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        with process:
            try:
                yield ours
            finally:
                process.terminate()


@contextmanager
def _crowd(url: str, calls: int) -> Iterator[Callable[[], None]]:
    """Yield what has the clients of several processes ask at once, and returns when all have their answers."""
    command = [sys.executable, "-c", _CROWD, url, str(calls)]
    with ExitStack() as stack:
        processes = []
        for _ in range(CROWD_PROCESSES):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.terminate)

        def hear() -> None:
            for process in processes:
                assert process.stdout is not None
                if not process.stdout.readline():
                    raise RuntimeError("bench service: a process of clients has ended")

        def ask_all() -> None:
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            hear()

        hear()  # all are attached
        yield ask_all
