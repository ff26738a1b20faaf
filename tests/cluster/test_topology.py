from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.cluster.topology import (
    AUTO,
    NONE,
    ClusterSpec,
    Process,
    ProcessKind,
    assign_ports,
    check_counts,
    plan,
    ports_from,
)
from kvstore.errors import ConfigError, KVStoreError

RUN = Path("/run/user/1/local")


def spec(replicas: int = 2, nodes: int = 1, **fields: Any) -> ClusterSpec:
    return ClusterSpec(model="/models/m", ports=assign_ports(8000, replicas, nodes), **fields)


def planned(made: ClusterSpec) -> dict[str, Process]:
    return {process.name: process for process in plan(made, RUN, lambda: "/usr/bin/redis-server")}


def settings(process: Process) -> dict[str, str]:
    """What --set gives; of two, the later one counts, as it does for the command."""
    pairs = zip(process.command, process.command[1:], strict=False)
    return dict(value.split("=", 1) for option, value in pairs if option == "--set")


def option(process: Process, name: str) -> list[str]:
    return [value for given, value in zip(process.command, process.command[1:], strict=False) if given == name]


def test_every_process_starts_after_what_it_needs() -> None:
    seen: set[str] = set()
    for process in plan(spec(3, 2), RUN, lambda: "redis-server"):
        assert set(process.needs) <= seen
        seen.add(process.name)

    assert seen == {"redis", "node-0", "node-1", "replica-0", "replica-1", "replica-2", "router"}


def test_replicas_of_one_node_attach_to_its_socket() -> None:
    processes = planned(spec(2, 1))

    assert option(processes["node-0"], "--socket") == [f"{RUN}/node-0.sock"]
    assert [settings(processes[f"replica-{i}"])["service.url"] for i in (0, 1)] == [f"unix://{RUN}/node-0.sock"] * 2


def test_replicas_are_spread_over_the_nodes() -> None:
    processes = planned(spec(3, 2))

    assert [settings(processes[f"replica-{i}"])["service.url"][-11:] for i in range(3)] == [
        "node-0.sock",
        "node-1.sock",
        "node-0.sock",
    ]
    assert processes["replica-1"].needs == ("node-1",)


def test_the_router_has_every_replica() -> None:
    processes = planned(spec(2, 2, policy="prefix"))

    assert option(processes["router"], "--replica") == [processes["replica-0"].url, processes["replica-1"].url]
    assert option(processes["router"], "--policy") == ["prefix"]


def test_ports_follow_from_the_routers() -> None:
    ports = {name: process.port for name, process in planned(spec(2, 2)).items()}

    assert ports == {
        "router": 8000,
        "replica-0": 8001,
        "replica-1": 8002,
        "redis": 8379,
        "node-0": 8470,
        "node-1": 8471,
    }


def test_no_two_processes_of_the_largest_cluster_have_a_port_in_common() -> None:
    ports = [process.port for process in planned(spec(64, 64)).values()]

    assert len(set(ports)) == len(ports) == 130


def test_any_ports_will_do() -> None:
    ports = ports_from([11, 12, 13, 14, 15], 2, 1)

    assert {ports.router, ports.redis, *ports.replicas, *ports.nodes} == {11, 12, 13, 14, 15}


def test_private_redis_holds_what_it_was_given_and_its_url_goes_to_the_nodes() -> None:
    processes = planned(spec(redis_bytes=123456789))

    assert option(processes["redis"], "--maxmemory") == ["123456789"]
    assert processes["node-0"].environment["KVSTORE_REDIS__URL"] == processes["redis"].url
    assert processes["node-0"].needs == ("redis",)


def test_a_redis_of_ones_own_is_not_started_and_its_password_is_on_no_command_line() -> None:
    processes = planned(spec(redis="redis://:secret@cache:6379/3"))

    assert "redis" not in processes
    assert processes["node-0"].environment["KVSTORE_REDIS__URL"] == "redis://:secret@cache:6379/3"
    assert not any("secret" in word for process in processes.values() for word in process.command)


def test_without_redis_no_server_is_looked_for() -> None:
    def fail() -> str:
        raise AssertionError("asked for redis-server")

    processes = plan(spec(2, 2, redis=NONE), RUN, fail)

    assert not any(process.kind is ProcessKind.REDIS or process.environment for process in processes)


def test_a_missing_redis_server_is_told_when_one_is_needed() -> None:
    def missing() -> str:
        raise KVStoreError("redis-server is not on PATH")

    with pytest.raises(KVStoreError, match="not on PATH"):
        plan(spec(redis=AUTO), RUN, missing)


def test_each_node_has_a_disk_directory_of_its_own() -> None:
    processes = planned(spec(2, 2, disk="/nvme/cluster"))

    assert [settings(processes[f"node-{i}"])["disk.path"] for i in (0, 1)] == [
        "/nvme/cluster/node-0",
        "/nvme/cluster/node-1",
    ]


def test_settings_go_to_nodes_and_replicas_and_win_over_those_of_a_laptop() -> None:
    processes = planned(spec(settings=("store.block_size=32", "store.load_deadline_s=3")))

    assert settings(processes["node-0"])["store.load_deadline_s"] == "3"
    assert {settings(processes[name])["store.block_size"] for name in ("node-0", "replica-0", "replica-1")} == {"32"}


def test_all_replicas_compute_with_equally_many_threads() -> None:
    processes = planned(spec(3, 1, threads=4, replica_arguments=("--reuse", "any")))

    commands = [processes[f"replica-{i}"] for i in range(3)]
    assert [option(one, "--threads") + option(one, "--reuse") for one in commands] == [["4", "any"]] * 3


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ({"engine": "tgi"}, "--engine is 'tgi'; it must be one of transformers, vllm, llamacpp"),
        ({"name": "Local"}, "--name is 'Local'"),
        ({"name": "../x"}, "--name"),
        ({"name": ""}, "--name"),
        ({"policy": "fastest"}, "--policy is 'fastest'; it must be one of round-robin, prefix"),
        ({"settings": ("redis.url=redis://h:1/0",)}, "--set redis.url=redis://h:1/0: .* use --redis"),
        ({"settings": ("service.socket=/x",)}, "--set service.socket=/x: the cluster decides this itself$"),
    ],
)
def test_a_wrong_spec_is_refused_by_the_name_of_the_option(field: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(spec(), **field)


@pytest.mark.parametrize(
    ("replicas", "nodes", "told"),
    [(0, 1, "--replicas is 0"), (65, 1, "--replicas is 65"), (2, 0, "--nodes is 0"), (2, 3, "--nodes is 3; .* 2:")],
)
def test_impossible_counts_are_refused(replicas: int, nodes: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_counts(replicas, nodes)


@pytest.mark.parametrize("port", [-1, 0, 65535])
def test_a_port_that_leaves_no_room_for_the_others_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port is {re.escape(str(port))}; it must be 1 to 65064"):
        assign_ports(port, 2, 1)


def test_a_socket_path_that_is_too_long_is_told_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="unix sockets allow 107; name a shorter --directory"):
        plan(spec(), Path("/" + "d" * 100), lambda: "redis-server")
