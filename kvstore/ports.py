"""Free ports of this machine."""

from __future__ import annotations

import random
import socket

HOST = "127.0.0.1"
# Below the ports of outgoing connections (32768 and up, net.ipv4.ip_local_port_range), and chosen at random: seconds
# may pass between choice and use, in which neither a connection nor another program like this one should take the port.
FIRST, LAST = 15_000, 32_700
TRIES = 10_000


def free_ports(count: int) -> list[int]:
    """So many different ports of 127.0.0.1 that nothing listens on at this moment. Raises OSError if there are none."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(FIRST, LAST), min(TRIES, LAST - FIRST)):
        if len(found) == count:
            break
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        found.append(port)
    if len(found) < count:
        raise OSError(f"no {count} free ports from {FIRST} to {LAST}")
    return found


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
