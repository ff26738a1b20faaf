"""The processes of a local cluster: their commands, ports, sockets, and the ones that each needs first.

    redis ──> node-0 ──> replica-0, replica-2 ──> router            nodes are `kvstore serve`, one per "machine";
          └─> node-1 ──> replica-1            ──┘                   replicas attach to their node's unix socket, and
                                                                    are of one engine (`engines`)

Pure: from a `ClusterSpec` and a run directory to a tuple of `Process`, in the order in which they start. Nothing is
opened, asked or started here, so the same spec always gives the same cluster: what `up` started, `down` and `status`
know from the spec alone.

The hard thing: ports. All follow from the router's, so that the URLs are the same every day and a test can take free
ones; see `assign_ports`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from kvstore.cluster.engines import DEFAULT_ENGINE, ReplicaPlace, find_engine, kvstore_command
from kvstore.errors import ConfigError
from kvstore.testing.redis_server import memory_options

HOST = "127.0.0.1"
AUTO, NONE = "auto", "none"  # of ClusterSpec.redis; anything else is a URL
POLICIES = ("round-robin", "prefix")
MAX_REPLICAS = 64
MAX_SOCKET_PATH = 107  # bytes; sun_path of Linux without its closing zero

# From the router's port: 8000, 8001..., 8379, 8470... Those of nodes and Redis end like their usual ones.
REDIS_OFFSET = 379
NODE_OFFSET = 470
MAX_PORT = 65535

# A laptop computes with all its cores while it loads. Deadlines of a server would count its waiting as misses.
NODE_SETTINGS = ("store.lookup_deadline_s=1", "store.load_deadline_s=10")
# What the cluster itself decides, and by which option.
DECIDED = {
    "service.socket": "",
    "service.url": "",
    "service.http_host": "",
    "service.http_port": "--port",
    "redis.url": "--redis",
    "disk.path": "--disk",
}


class ProcessKind(str, Enum):
    """The kind of a process."""

    REDIS = "redis"
    NODE = "node"
    REPLICA = "replica"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Ports:
    """A TCP port of 127.0.0.1 for every process."""

    router: int
    replicas: tuple[int, ...]
    nodes: tuple[int, ...]
    redis: int


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """The specification of a cluster. Checked when it is made: raises ConfigError.

    model:    directory, hub id or file, as the engine's replica takes it.
    engine:   of the replicas, one of `engines.ENGINES`; server: the program it runs, as it was found; "" for none.
    redis:    AUTO is a private server, NONE is none, anything else is the URL of one. A URL may hold a password.
    policy:   of the router, one of POLICIES.
    dtype:    of the model; "" leaves it to the engine.
    threads:  that each replica computes with; equal in all, so that all compute the same bits.
    disk:     directory of the nodes' disk tiers, one below it for each; None is no disk tier.
    settings: FIELD=VALUE for nodes and replicas, over NODE_SETTINGS.
    replica_arguments: more options of a replica's command.
    """

    model: str
    ports: Ports
    name: str = "local"
    redis: str = AUTO
    policy: str = POLICIES[0]
    engine: str = DEFAULT_ENGINE
    server: str = ""
    dtype: str = ""
    threads: int = 1
    redis_bytes: int = 1 << 30
    disk: str | None = None
    settings: tuple[str, ...] = ()
    replica_arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", self.name):
            raise ConfigError(f"--name is {self.name!r}; it must be 1 to 32 of a-z, 0-9 and -, the first no -")
        find_engine(self.engine)
        if self.policy not in POLICIES:
            raise ConfigError(f"--policy is {self.policy!r}; it must be one of {', '.join(POLICIES)}")
        for setting in self.settings:
            option = DECIDED.get(setting.partition("=")[0].strip())
            if option is not None:
                instead = f"; use {option}" if option else ""
                raise ConfigError(f"--set {setting}: the cluster decides this itself{instead}")


@dataclass(frozen=True, slots=True)
class Process:
    """One process of the cluster.

    command:     without anything secret: other users see command lines.
    environment: what it gets beside ours, and what may be secret.
    needs:       names of what must be ready before this starts.
    """

    name: str
    kind: ProcessKind
    command: tuple[str, ...]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """The address at which it listens."""
        return f"redis://{HOST}:{self.port}/0" if self.kind is ProcessKind.REDIS else f"http://{HOST}:{self.port}"


def assign_ports(first: int, num_replicas: int, num_nodes: int) -> Ports:
    """Ports that follow from the router's: replicas after it, nodes 470 and Redis 379 above. Raises ConfigError."""
    check_counts(num_replicas, num_nodes)
    if not 1 <= first <= MAX_PORT - NODE_OFFSET - num_nodes:
        raise ConfigError(
            f"--port is {first}; it must be 1 to {MAX_PORT - NODE_OFFSET - num_nodes}, for the other ports follow from "
            "it, or 0 for any free ones"
        )
    return Ports(
        router=first,
        replicas=tuple(first + 1 + index for index in range(num_replicas)),
        nodes=tuple(first + NODE_OFFSET + index for index in range(num_nodes)),
        redis=first + REDIS_OFFSET,
    )


def ports_from(ports: Sequence[int], num_replicas: int, num_nodes: int) -> Ports:
    """The same from a list of any ports, `num_replicas + num_nodes + 2` of them."""
    check_counts(num_replicas, num_nodes)
    router, redis, *others = ports
    return Ports(router, tuple(others[:num_replicas]), tuple(others[num_replicas:][:num_nodes]), redis)


def check_counts(num_replicas: int, num_nodes: int) -> None:
    """Raise ConfigError unless there can be a cluster of so many."""
    if not 1 <= num_replicas <= MAX_REPLICAS:
        raise ConfigError(f"--replicas is {num_replicas}; it must be 1 to {MAX_REPLICAS}")
    if not 1 <= num_nodes <= num_replicas:
        raise ConfigError(
            f"--nodes is {num_nodes}; it must be 1 to the number of replicas, {num_replicas}: a node without a replica "
            "would hold nothing"
        )


def plan(spec: ClusterSpec, directory: Path, redis_server: Callable[[], str]) -> tuple[Process, ...]:
    """The processes of a cluster, in the order in which they start.

    directory:    where sockets lie and processes run; must be short enough for a unix socket's path.
    redis_server: gives the path of redis-server; called only where one is to be started.

    Raises ConfigError, and whatever `redis_server` does.
    """
    processes = []
    if spec.redis == AUTO:
        processes.append(_redis(spec, directory, redis_server()))
    nodes = [_node(spec, directory, index) for index in range(len(spec.ports.nodes))]
    replicas = [_replica(spec, directory, index) for index in range(len(spec.ports.replicas))]
    return (*processes, *nodes, *replicas, _router(spec, replicas))


def _redis(spec: ClusterSpec, directory: Path, binary: str) -> Process:
    options = ["--bind", HOST, "--port", str(spec.ports.redis), "--dir", str(directory), "--daemonize", "no"]
    options += ["--save", "", "--appendonly", "no"]
    options += memory_options(spec.redis_bytes, "allkeys-lfu")  # see docs/redis.md
    return Process("redis", ProcessKind.REDIS, (binary, *options), spec.ports.redis)


def _node(spec: ClusterSpec, directory: Path, index: int) -> Process:
    socket = _socket(directory, index)
    if len(str(socket).encode()) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"the socket {socket} has a path of {len(str(socket).encode())} bytes, and unix sockets allow "
            f"{MAX_SOCKET_PATH}; name a shorter --directory"
        )
    settings = [*NODE_SETTINGS, *spec.settings, f"service.http_port={spec.ports.nodes[index]}"]
    if spec.disk is not None:
        settings.append(f"disk.path={Path(spec.disk) / f'node-{index}'}")
    environment = {}
    if spec.redis == AUTO:
        environment["KVSTORE_REDIS__URL"] = f"redis://{HOST}:{spec.ports.redis}/0"
    elif spec.redis != NONE:
        environment["KVSTORE_REDIS__URL"] = spec.redis
    return Process(
        f"node-{index}",
        ProcessKind.NODE,
        kvstore_command("serve", "--verbose", "--socket", str(socket), settings=settings),
        spec.ports.nodes[index],
        environment,
        needs=("redis",) if spec.redis == AUTO else (),
    )


def _replica(spec: ClusterSpec, directory: Path, index: int) -> Process:
    node = index % len(spec.ports.nodes)
    replica = ReplicaPlace(
        f"replica-{index}",
        HOST,
        spec.ports.replicas[index],
        spec.model,
        spec.dtype,
        spec.threads,
        spec.server,
        str(engine_log(directory, f"replica-{index}")),
        (*spec.settings, f"service.url=unix://{_socket(directory, node)}"),
        spec.replica_arguments,
    )
    command = find_engine(spec.engine).command(replica)
    return Process(replica.name, ProcessKind.REPLICA, command, replica.port, needs=(f"node-{node}",))


def _router(spec: ClusterSpec, replicas: Sequence[Process]) -> Process:
    options = ["--policy", spec.policy, "--host", HOST, "--port", str(spec.ports.router)]
    for replica in replicas:
        options += ["--replica", replica.url]
    needs = tuple(replica.name for replica in replicas)
    return Process("router", ProcessKind.ROUTER, kvstore_command("router", *options), spec.ports.router, needs=needs)


def engine_log(directory: Path, name: str) -> Path:
    """The file for what a replica's engine prints, where that has a process of its own."""
    return directory / f"{name}.engine.log"


def _socket(directory: Path, node: int) -> Path:
    return directory / f"node-{node}.sock"
