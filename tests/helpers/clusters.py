"""Clusters for tests: stand-ins for the processes of one, which start in milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kvstore.cluster import supervisor
from kvstore.cluster.supervisor_directory import RunDirectory
from kvstore.cluster.topology import NONE, ClusterSpec, Process, ProcessKind, ports_from
from kvstore.ports import free_ports

# Answers /readyz with 200; says what it is told to; with "stubborn" it ignores SIGTERM.
SERVER = """
import http.server, signal, sys
port, mode = int(sys.argv[1]), sys.argv[2]
print("this is", mode, flush=True)
if mode == "ends":
    sys.exit(3)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "never" else 200)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(name: str, kind: ProcessKind, port: int, mode: str = "ready", needs: Sequence[str] = ()) -> Process:
    """A process that plays one of a cluster. mode: ready, never (it runs and is not ready), ends, stubborn."""
    command = (sys.executable, "-S", "-c", SERVER, str(port), mode)
    return Process(name, kind, command, port, needs=tuple(needs))


def stand_ins(node: str = "ready", replica: str = "ready", router: str = "ready") -> tuple[Process, ...]:
    """A node, a replica and a router, each in its mode."""
    ports = free_ports(3)
    return (
        stand_in("node-0", ProcessKind.NODE, ports[0], node),
        stand_in("replica-0", ProcessKind.REPLICA, ports[1], replica, ["node-0"]),
        stand_in("router", ProcessKind.ROUTER, ports[2], router, ["replica-0"]),
    )


def a_spec(name: str = "test") -> ClusterSpec:
    """Any spec: what the stand-ins are is not read from it."""
    return ClusterSpec(model="none", ports=ports_from(free_ports(4), 1, 1), name=name, redis=NONE)


def stand_by(parent: str) -> None:
    """What `kvstore cluster up` does, with stand-ins, in a process of its own; prints a line when they are up."""
    processes = stand_ins()
    supervisor.plan = lambda *_: processes  # type: ignore[assignment]
    with supervisor.interruptible(), supervisor.brought_up(a_spec(), RunDirectory(Path(parent), "test")) as brought:
        print("up", flush=True)
        brought.stand()
