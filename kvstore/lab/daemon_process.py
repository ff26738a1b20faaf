"""A node daemon in a process of its own, for as long as a measurement takes."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.errors import KVStoreError
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.service.client.connect import connect
from kvstore.service.client.store import RemoteStore
from radix.namespace import Namespace

BLOCK_SIZE = 16
START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0
_POLL_S = 0.05


@contextmanager
def daemon_process(capacity_bytes: int, *settings: str) -> Iterator[tuple[str, int]]:
    """Yield a daemon's URL and its process id. settings: as for `kvstore serve --set`.

    Raises KVStoreError if it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as directory:
        path, log = Path(directory) / "kv.sock", Path(directory) / "log"
        command = [sys.executable, "-m", "kvstore", "serve", "--socket", str(path)]
        for setting in (f"host.capacity_bytes={capacity_bytes}", "service.http_port=none", *settings):
            command += ["--set", setting]
        with log.open("wb") as errors, subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors) as daemon:
            try:
                until = time.monotonic() + START_TIMEOUT_S
                while not _listens(path):
                    if daemon.poll() is not None or time.monotonic() > until:
                        told = log.read_text(errors="replace").strip()
                        raise KVStoreError(f"bench: the daemon did not come up: {told or 'it says nothing'}")
                    time.sleep(_POLL_S)
                yield f"unix://{path}", daemon.pid
            finally:
                daemon.terminate()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0  # it is there a moment before anybody listens


def open_remote(url: str, page_bytes: int) -> RemoteStore:
    """Return a store of pages of `page_bytes` that the daemon keeps; the caller closes it."""
    layout = Layout(BLOCK_SIZE, (LayerGroup(GroupKind.FULL, (0,), page_bytes),), "bench", "uint8")
    namespace = Namespace("bench", "1", layout.dtype, layout.fingerprint, BLOCK_SIZE)
    return connect(url, layout, namespace, call_timeout_s=CALL_TIMEOUT_S)
