"""`kvstore cluster`: engine replicas that share a cache on this machine, brought up and taken down by one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli.command import Command
from kvstore.cli.options import ReplicaDtype
from kvstore.console import add_row, console, print_json, table
from kvstore.errors import KVStoreError
from kvstore.extras import how_to_install
from kvstore.limits import usable_cpus

if TYPE_CHECKING:
    from kvstore.cluster.supervisor_directory import RunDirectory
    from kvstore.cluster.topology import ClusterSpec

HELP = """
A cluster on this machine: Redis, node daemons, replicas of a model, a router.

\b
Two replicas ...
  kvstore cluster up                          share one daemon, and its memory
  kvstore cluster up --nodes 2                as on two machines, share Redis
  kvstore cluster up --nodes 2 --redis none   have private caches
  kvstore cluster up --engine vllm            are vLLM servers; llamacpp: llama-servers

OpenAI's API is at http://127.0.0.1:8000/v1. Play traffic at it: kvstore load.
"""

cluster = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="rich", add_completion=False)

Name = Annotated[str, typer.Option("--name", help="Of the cluster; several may be up at once.")]
Directory = Annotated[
    Path | None,
    typer.Option("--directory", help="Where logs, sockets and pids are; unless given, below ~/.local/state."),
]


@cluster.command(cls=Command)
def up(
    for_replicas: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="Passed on to each replica, e.g. -- --max-queue 8 --reuse any"),
    ] = None,
    name: Name = "local",
    replicas: Annotated[int, typer.Option(help="Engine replicas, each with the whole model.")] = 2,
    nodes: Annotated[int, typer.Option(help="Node daemons; replicas are spread over them, as over machines.")] = 1,
    redis: Annotated[
        str, typer.Option(metavar="auto|none|URL", help="A private server, none, or the one at a URL.")
    ] = "auto",
    policy: Annotated[
        str, typer.Option(help="Of the router: round-robin, or prefix (where most is cached).")
    ] = "round-robin",
    engine: Annotated[
        str, typer.Option(help="Of the replicas: transformers (light), vllm, or llamacpp.")
    ] = "transformers",
    server: Annotated[
        str | None,
        typer.Option(metavar="PROGRAM", help="The engine's own: vllm or the python that has it; llama-server."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id of transformers, or random; a GGUF file with llamacpp. SmolLM2-135M (93 MB, "
            "once) unless given."
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Of the router; the others follow from it. 0: any free ones.")] = 8000,
    dtype: Annotated[
        ReplicaDtype | None, typer.Option(help="Of the model; float32 of transformers unless given.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of each replica. 0: the cores, shared out.")] = 0,
    disk: Annotated[
        Path | None, typer.Option(help="Directory of disk tiers, one below it for each node; none unless given.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Of nodes and replicas, e.g. host.capacity_bytes=4GiB."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Come back when it is up, and leave it up.")] = False,
    start_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest wait until all are ready.")] = 300.0,
    directory: Directory = None,
) -> None:
    """Bring a cluster up, and take it down at Ctrl-C."""
    run = _directory(directory, name)
    from kvstore.cluster.engines import Weights, find_engine
    from kvstore.cluster.supervisor import brought_up, interruptible
    from kvstore.cluster.topology import ClusterSpec, assign_ports, check_counts, ports_from
    from kvstore.demo.models import resolve_gguf, resolve_model
    from kvstore.ports import free_ports

    check_counts(replicas, nodes)
    _check_settings(setting or [], redis)
    chosen = find_engine(engine)
    program = chosen.find_server(server)
    found = {Weights.TRANSFORMERS: resolve_model, Weights.GGUF: resolve_gguf}[chosen.weights](model, _tell)
    spec = ClusterSpec(
        name=name,
        model=found.source,
        ports=assign_ports(port, replicas, nodes)
        if port
        else ports_from(free_ports(replicas + nodes + 2), replicas, nodes),
        redis=redis,
        policy=policy,
        engine=engine,
        server=program,
        dtype="" if dtype is None else dtype.value,
        threads=threads or max(1, usable_cpus() // replicas),
        disk=None if disk is None else str(disk.expanduser().absolute()),
        settings=tuple(setting or ()),
        replica_arguments=tuple(for_replicas or ()),
    )

    size = f"{_count(replicas, 'replica')} of {found.name} ({engine}), {_count(nodes, 'node')}"
    _tell(f"cluster {name}: {size}, logs in {run.path}")
    with interruptible(), brought_up(spec, run, _tell, timeout_s=start_timeout) as supervisor:
        _print_urls(spec)
        if detach:
            _tell(f"it stays up; end it: kvstore cluster down{_option(name, directory)}")
            return
        _tell("Ctrl-C ends it")
        supervisor.stand()


@cluster.command(cls=Command)
def down(name: Name = "local", directory: Directory = None) -> None:
    """End a cluster, also one whose `up` was killed; leaves nothing running."""
    run = _directory(directory, name)
    from kvstore.cluster.supervisor import take_down

    count = take_down(run, _tell)
    _tell(f"cluster {name}: {f'{count} processes ended' if count else 'nothing was running'}")


@cluster.command(cls=Command)
def status(
    name: Annotated[str | None, typer.Option("--name", help="Of one cluster; all are shown without.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    directory: Directory = None,
) -> None:
    """Show the processes of what is up: state, pid, memory, URL."""
    runs = _all(directory) if name is None else [_directory(directory, name)]
    from dataclasses import asdict

    from kvstore.cluster.supervisor import Supervisor
    from kvstore.units import format_bytes

    clusters = {run.name: Supervisor(_spec(run), run).status() for run in runs}
    if as_json:
        print_json({key: [asdict(row) for row in rows] for key, rows in clusters.items()})
        return
    if not clusters:
        console().print("no cluster is up; bring one up: kvstore cluster up")
    for key, rows in clusters.items():
        output = table("process", "state", "pid", "RSS", "URL", title=f"cluster {key}", right=("pid", "RSS"))
        for row in rows:
            size = "" if row.rss_bytes is None else format_bytes(row.rss_bytes)
            style = None if row.state == "ready" else "bold red"
            add_row(output, row.name, row.state, str(row.pid or ""), size, row.url, style=style)
        console().print(output)


@cluster.command(cls=Command)
def restart(
    processes: Annotated[list[str] | None, typer.Argument(help="Such as replica-0. All but Redis without.")] = None,
    name: Name = "local",
    start_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest wait until all are ready.")] = 300.0,
    directory: Directory = None,
) -> None:
    """End processes of a cluster, where they still run, and start them again."""
    run = _directory(directory, name)
    from kvstore.cluster.supervisor import Supervisor
    from kvstore.cluster.topology import ProcessKind

    supervisor = Supervisor(_spec(run), run, _tell)
    known = {process.name: process for process in supervisor.processes}
    for wanted in processes or []:
        if wanted not in known:
            raise KVStoreError(f"cluster {name!r} has no process {wanted!r}; it has {', '.join(known)}")
    names = processes or [one.name for one in known.values() if one.kind is not ProcessKind.REDIS]
    supervisor.stop(names)
    supervisor.check_ports(names)
    supervisor.start(names, timeout_s=start_timeout)


# ---- private --------------------------------------------------------------------------------------------------------


def _directory(parent: Path | None, name: str) -> RunDirectory:
    try:
        from kvstore.cluster.supervisor_directory import RunDirectory, default_parent
    except ImportError as error:
        raise KVStoreError(f"the cluster cannot start: {error}; {how_to_install('cluster')}") from error
    return RunDirectory(parent or default_parent(), name)


def _all(parent: Path | None) -> list[RunDirectory]:
    any_of_them = _directory(parent, "local")
    return type(any_of_them).all(any_of_them.parent)


def _spec(run: RunDirectory) -> ClusterSpec:
    from kvstore.cluster.supervisor_directory import ClusterError

    spec = run.read()
    if spec is None:
        names = ", ".join(other.name for other in type(run).all(run.parent)) or "none"
        raise ClusterError(f"no cluster {run.name!r} is up (up are: {names}); bring it up: kvstore cluster up")
    return spec


def _check_settings(assignments: list[str], redis: str) -> None:
    """Raise ConfigError now for what every node would refuse later."""
    from kvstore.cli.config import overrides
    from kvstore.cluster.topology import AUTO, NONE
    from kvstore.config.sections import Config
    from kvstore.config.sources import Setting, nest, read_keywords

    values = overrides(assignments)
    if redis not in (AUTO, NONE):
        values["redis.url"] = Setting(redis, "--redis")
    given = read_keywords(Config, values)
    Config(_given=given, **nest(given))


def _tell(line: str) -> None:
    """One line of progress, as it is: paths and logs may have brackets in them."""
    console(stderr=True).print(line, markup=False, soft_wrap=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _option(name: str, directory: Path | None) -> str:
    """The name of this cluster for the other commands."""
    named = "" if name == "local" else f" --name {name}"
    return named if directory is None else f"{named} --directory {directory}"


def _print_urls(spec: ClusterSpec) -> None:
    router = f"http://127.0.0.1:{spec.ports.router}"
    output = table("what", "where")
    add_row(output, "OpenAI API", f"{router}/v1")
    for index, port in enumerate(spec.ports.nodes):
        add_row(output, f"dashboard of node-{index}", f"http://127.0.0.1:{port}/")
    add_row(output, "metrics", f"{router}/metrics, and of nodes and replicas")
    add_row(output, "play traffic", f"kvstore load --url {router} --workload shared-prompt --baseline")
    console().print(output)
