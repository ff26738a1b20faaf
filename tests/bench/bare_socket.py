"""The least that two processes can do with pages: a bare socket between slots here and slots there."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.tiers.host import HostSlab

NUM_BATCHES = 4  # in the slots of an end, used in turn


class Bare:
    """One end of the least that two processes can do: pages out of slots into a socket, out of it into slots.

    Orders are one byte: P and G put and get a batch, p and g with a checksum of each page at both ends.
    """

    def __init__(self, connected: socket.socket, page_bytes: int, num_pages: int, pid: int = 0) -> None:
        """num_pages: of a batch; pid: of the other end."""
        self.pid = pid
        self._socket = connected
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._num_pages = num_pages
        self._slab = HostSlab(NUM_BATCHES * num_pages, page_bytes, shared_name="bench")
        self._at = 0

    def run(self, order: bytes) -> None:
        """Give an order and do this end's part of it."""
        self._socket.sendall(order)
        self._move(order, is_sender=order in b"Pp")
        if order in b"Pp":
            self._socket.recv(1)

    def serve(self) -> None:
        """Do the other end's part until it hangs up."""
        while order := self._socket.recv(1):
            self._move(order, is_sender=order in b"Gg")
            if order in b"Pp":
                self._socket.sendall(b"k")

    def next_slots(self) -> list[npt.NDArray[np.uint8]]:
        """The slots of the next batch."""
        first = self._at % self._slab.num_slots
        return [self._slab.array(slot) for slot in range(first, first + self._num_pages)]

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
        self._slab.close()

    def _move(self, order: bytes, *, is_sender: bool) -> None:
        for slot in self.next_slots():
            view = slot.data
            if is_sender:
                if order.islower():
                    xxhash.xxh3_64_intdigest(view)
                self._socket.sendall(view)
                continue
            at = 0
            while at < len(view):
                at += self._socket.recv_into(view[at:])
            if order.islower():
                xxhash.xxh3_64_intdigest(view)
        self._at += self._num_pages


@contextmanager
def bare_process(page_bytes: int, num_pages: int) -> Iterator[Bare]:
    """A process of its own at one end, this one at the other. num_pages: of a batch."""
    code = "import sys; from tests.bench.bare_socket import serve_bare; serve_bare(int(sys.argv[1]), int(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(page_bytes), str(num_pages)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        connected = socket.create_connection(("127.0.0.1", int(process.stdout.readline())))
        with closing(Bare(connected, page_bytes, num_pages, process.pid)) as bare:
            yield bare


def serve_bare(page_bytes: int, num_pages: int) -> None:
    """The other process of `bare_process`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        with closing(Bare(server.accept()[0], page_bytes, num_pages)) as bare:
            bare.serve()
