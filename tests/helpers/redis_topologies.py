"""Redis and Valkey as they are deployed: one server, a primary with a replica under Sentinel, a cluster of shards.

All of it is on the loopback, at free ports, and starts within the time the servers themselves wait: the nodes of a
cluster are told by a file who has which slots, so that nothing has to be agreed on first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import redis

from kvstore.ports import free_port, free_ports
from kvstore.testing.redis_server import LocalRedis, RedisDidNotStart
from tests.helpers.redis_server import command
from tests.helpers.waiting import WAIT_S, wait_until

Kind = Literal["single", "sentinel", "cluster"]
KINDS: tuple[Kind, ...] = ("single", "sentinel", "cluster")
SERVICE = "pages"
NUM_SLOTS = 16384
STEADY_MS = 60_000  # a busy machine is no dead node
TRIES = 3  # somebody may take a port between our look and the server's


@dataclass
class Servers:
    """Servers that hold keys together.

    url:       where a tier finds them.
    nodes:     primaries, then their replicas in the same order.
    sentinels: that watch them.
    """

    kind: Kind
    url: str
    nodes: list[LocalRedis]
    sentinels: list[Sentinel] = field(default_factory=list)

    @property
    def primaries(self) -> list[LocalRedis]:
        """Those that say so now."""
        return [node for node in self.nodes if is_primary(node)]

    def on_each(self, *words: object) -> list[Any]:
        """Run a command on every node."""
        return [command(node, *words) for node in self.nodes]

    def flush(self) -> None:
        """Forget all keys, also on the replicas."""
        for node in self.primaries:
            command(node, "FLUSHALL")
        wait_until(lambda: not any(self.on_each("DBSIZE")), "the replicas are empty")

    def freeze(self) -> None:
        """Stop all from running, sentinels too."""
        for one in (*self.nodes, *self.sentinels):
            one.freeze()

    def thaw(self) -> None:
        """Continue all."""
        for one in (*self.nodes, *self.sentinels):
            one.thaw()

    def kill(self) -> None:
        """End all servers, as crashes do; `start` brings them back empty, in the same roles."""
        for node in self.nodes:
            node.kill()

    def start(self) -> None:
        """Start what was killed, and wait until it serves."""
        for node in self.nodes:
            node.start()
        if self.kind == "sentinel":
            _follow(self.nodes[1], self.nodes[0])
        if self.kind == "cluster":
            wait_until(lambda: is_whole(self.nodes), "the cluster is up")


class Sentinel:
    """A sentinel of the primary at a port, from `start` to `stop`."""

    def __init__(self, binary: str, directory: Path, primary_port: int, down_after_ms: int, *lines: str) -> None:
        self.port = free_port()
        self._directory = directory
        config = directory / f"sentinel-{self.port}.conf"
        watched = (
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary_port} 1",
            f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}",
            f"sentinel failover-timeout {SERVICE} 10000",
        )
        # Names have to be allowed before one is told.
        text = [*lines, f"port {self.port}", "bind 127.0.0.1 -::1", f"dir {directory}", *watched]
        config.write_text("\n".join(text) + "\n")
        self._process = subprocess.Popen(
            [binary, str(config), "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def ask(self, *words: object) -> Any:
        """Run a command there."""
        with redis.Redis("127.0.0.1", self.port, protocol=2, socket_timeout=WAIT_S) as client:
            run: Any = client.execute_command
            return run(*words)

    def answers(self) -> bool:
        """Whether it is up, and knows the replica of its primary."""
        with suppress(redis.exceptions.RedisError):
            return bool(self.ask("SENTINEL", "REPLICAS", SERVICE))
        return False

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def single(binary: str, *arguments: str) -> Iterator[Servers]:
    """One server."""
    with LocalRedis(binary=binary, arguments=arguments) as server:
        yield Servers("single", server.url, [server])


@contextmanager
def under_sentinel(
    binary: str, *arguments: str, down_after_ms: int = STEADY_MS, lines: Sequence[str] = ()
) -> Iterator[Servers]:
    """A primary with a replica, and a sentinel. lines: of its configuration."""
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(LocalRedis(binary=binary, arguments=("--repl-diskless-sync-delay", "0", *arguments)))
            for _ in range(2)
        ]
        _follow(nodes[1], nodes[0])
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-sentinel-")))
        sentinel = Sentinel(binary, directory, nodes[0].port, down_after_ms, *lines)
        stack.callback(sentinel.stop)
        wait_until(sentinel.answers, "the sentinel knows the replica")
        yield Servers("sentinel", f"redis+sentinel://127.0.0.1:{sentinel.port}/{SERVICE}", nodes, [sentinel])


@contextmanager
def cluster(
    binary: str,
    *arguments: str,
    shards: int = 3,
    replicas: int = 1,
    node_timeout_ms: int = STEADY_MS,
    tls: tuple[Path, Path] | None = None,
) -> Iterator[Servers]:
    """A cluster of `shards` primaries with as many slots each, and `replicas` of each."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-cluster-")))
        for attempt in range(TRIES):
            nodes = _laid_out(binary, directory, arguments, shards, replicas, node_timeout_ms, tls)
            try:
                for node in nodes:
                    stack.callback(node.stop)
                    node.start()
                break
            except RedisDidNotStart:
                for node in nodes:
                    node.stop()
                if attempt + 1 == TRIES:
                    raise
        wait_until(lambda: is_whole(nodes), "the cluster is up")
        scheme, query = ("redis", "") if tls is None else ("rediss", f"?ssl_ca_certs={tls[0]}")
        yield Servers("cluster", f"{scheme}+cluster://127.0.0.1:{nodes[0].port}{query}", nodes)


@contextmanager
def joined(binary: str, servers: Servers) -> Iterator[LocalRedis]:
    """One more node of a cluster, known to all, without slots."""
    bus = free_port()
    options = ("--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", str(STEADY_MS))
    with LocalRedis(binary=binary, arguments=options) as node:
        servers.on_each("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        nodes = [*servers.nodes, node]
        known = f"cluster_known_nodes:{len(nodes)}".encode()
        wait_until(lambda: all(known in command(one, "CLUSTER", "INFO").split() for one in nodes), "all know the node")
        wait_until(lambda: is_whole(nodes), "the cluster is up")
        yield node


@contextmanager
def topology(kind: Kind, binary: str) -> Iterator[Servers]:
    """Servers of a kind that fail over by nobody's decision but a test's."""
    made = {"single": single, "sentinel": under_sentinel, "cluster": cluster}[kind](binary)
    with made as servers:
        yield servers


def is_primary(node: LocalRedis) -> bool:
    """Whether a node says so now. One that does not run is none; one whose role changes throws its clients out."""
    with suppress(redis.exceptions.RedisError):
        return bool(command(node, "ROLE")[0] == b"master")
    return False


def is_whole(nodes: Sequence[LocalRedis]) -> bool:
    """True when all nodes of a cluster say that it serves, and replicas have caught up."""
    for node in nodes:
        with suppress(redis.exceptions.RedisError):
            role = command(node, "ROLE")
            if b"cluster_state:ok" in command(node, "CLUSTER", "INFO") and (
                role[0] == b"master" or role[3] == b"connected"
            ):
                continue
        return False
    return True


def node_id(node: LocalRedis) -> str:
    """Of a cluster's node."""
    name: bytes = command(node, "CLUSTER", "MYID")
    return name.decode()


def _follow(replica: LocalRedis, primary: LocalRedis) -> None:
    command(replica, "REPLICAOF", "127.0.0.1", primary.port)
    wait_until(lambda: command(replica, "ROLE")[3] == b"connected", "the replica has caught up")


def _laid_out(
    binary: str,
    directory: Path,
    arguments: Sequence[str],
    shards: int,
    replicas: int,
    node_timeout_ms: int,
    tls: tuple[Path, Path] | None,
) -> list[LocalRedis]:
    """The nodes, each with a file that says who is who. None is started."""
    count = shards * (1 + replicas)
    ports = free_ports(2 * count)
    ids, shard_ids = ([os.urandom(20).hex() for _ in range(number)] for number in (count, shards))
    # Without it a node of Valkey leaves its own shard out of CLUSTER SHARDS; Redis 7.0 does not know the field.
    names_shards = Path(binary).name.startswith("valkey")
    lines = []
    for i in range(count):
        where = f"{ids[i]} 127.0.0.1:{ports[i]}@{ports[count + i]}"
        where += f",,tls-port=0,shard-id={shard_ids[i % shards]}" if names_shards else ""
        first, last = (NUM_SLOTS * at // shards for at in (i, i + 1))
        if i < shards:
            lines.append(f"{where} {{}}master - 0 0 {i + 1} connected {first}-{last - 1}")
        else:
            lines.append(f"{where} {{}}slave {ids[i % shards]} 0 0 {i % shards + 1} connected")
    nodes = []
    for i in range(count):
        config = directory / f"nodes-{ports[i]}.conf"
        mine = [line.format("myself," if j == i else "") for j, line in enumerate(lines)]
        config.write_text("\n".join([*mine, f"vars currentEpoch {shards} lastVoteEpoch 0"]) + "\n")
        options = {
            "--cluster-enabled": "yes",
            "--cluster-config-file": str(config),
            "--cluster-port": str(ports[count + i]),
            "--cluster-node-timeout": str(node_timeout_ms),
            "--repl-diskless-sync-delay": "0",
            **({} if tls is None else {"--tls-cluster": "yes", "--tls-replication": "yes"}),
        }
        flat = [word for pair in options.items() for word in pair]
        node = LocalRedis(binary=binary, arguments=(*flat, *arguments), tls_cert=tls and tls[0], tls_key=tls and tls[1])
        node.port = ports[i]
        nodes.append(node)
    return nodes
