"""Whether a llama-server is still the process that it was, running the file that it was.

No answer of llama-server's tells one process from the next: started anew with another rope scaling, or on a GGUF file
that was put in place of the first, it tells the same of itself. The socket on which it listens is another one then, and
the kernel does not use its number again. It is seen for servers of this machine only, and for those whose port a proxy
of this machine's holds, as for containers.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

SOCKETS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENING = "0A"
_ADDRESS, _STATE, _NUMBER = 1, 3, 9  # columns


@dataclass(frozen=True, slots=True)
class Life:
    """What changes when a server is started anew.

    sockets: numbers of the sockets that listen on its port; none for a server that is not seen from here.
    file:    device, number, size and time of its GGUF file; none if that is not here.
    """

    sockets: tuple[str, ...] = ()
    file: tuple[int, ...] = ()

    @property
    def is_seen(self) -> bool:
        """Whether an equal one means the same process."""
        return bool(self.sockets)


def life_of(url: str, model: str | None) -> Life:
    """Look at the server at `url` and at the file of its model. Blocks, for about a millisecond; raises nothing."""
    file: tuple[int, ...] = ()
    try:
        if model is not None:
            found = Path(model).expanduser().stat()
            file = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    except (OSError, ValueError, RuntimeError):
        pass
    return Life(_sockets(url), file)


def _sockets(url: str) -> tuple[str, ...]:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        if not _is_here(parts.hostname or "", port):
            return ()
        tables = [path.read_text().splitlines()[1:] for path in SOCKETS if path.exists()]
    except (OSError, ValueError, KeyError):
        return ()
    rows = [line.split() for table in tables for line in table]
    listening = [row for row in rows if row[_STATE] == _LISTENING and int(row[_ADDRESS].rpartition(":")[2], 16) == port]
    return tuple(sorted(row[_NUMBER] for row in listening))


def _is_here(host: str, port: int) -> bool:
    """Whether an address is one of this machine's: what is sent to it is sent from it too."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        return bool(probe.getsockname()[0] == address[0])
