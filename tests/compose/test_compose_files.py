"""The compose file, and what its Prometheus and Grafana are given, against the code; without docker."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from kvstore.cli.app import app
from kvstore.cluster.admission import Admission
from kvstore.cluster.metrics import ReplicaMetrics, RouterMetrics
from kvstore.cluster.topology import assign_ports
from kvstore.config.sections import Config
from kvstore.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"\$\{[A-Z_]+(?::?-([^}]*))?\}")
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "kvstore.json"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The compose file with the defaults of its variables."""
    text = VARIABLE.sub(lambda found: found[1] or "", (ROOT / "docker-compose.yml").read_text())
    made: dict[str, Any] = yaml.safe_load(text)
    return made


def ours(compose: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Service -> arguments of `kvstore`."""
    for name, service in compose["services"].items():
        if service["image"] == "kvtiers:local":
            yield name, [*service.get("entrypoint", ["kvstore"])[1:], *service["command"]]


def test_every_image_can_be_named_by_a_variable() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]

    assert all(re.fullmatch(r"\$\{[A-Z]+_IMAGE:-.+\}", service["image"]) for service in services.values())


def test_commands_and_options_are_known(compose: dict[str, Any]) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    checked = {}
    for name, (command, *arguments) in ours(compose):
        if command == "demo":  # its options are read by the demo itself
            continue
        options = {option for parameter in known[command].params for option in parameter.opts}
        given = {word for word in arguments if word.startswith("--")}
        assert given <= options, name
        checked[name] = len(given)

    assert set(checked) == {"node", "replica-0", "replica-1", "router", "load"}
    assert all(checked.values())


def test_replicas_of_vllm_replace_those_there_are_and_their_options_are_known(compose: dict[str, Any]) -> None:
    text = VARIABLE.sub(lambda found: found[1] or "", (ROOT / "deploy" / "vllm" / "compose.yml").read_text())
    over = yaml.safe_load(text)["services"]
    options = {option for one in typer.main.get_command(app).commands["vllm"].params for option in one.opts}  # type: ignore[attr-defined]

    assert over.keys() == {name for name in compose["services"] if name.startswith("replica-")}
    for name, service in over.items():
        command, *arguments = service["command"]
        assert command == "vllm"
        assert {word for word in arguments if word.startswith("--")} <= options
        plain = compose["services"][name]["command"]
        assert arguments == plain[1:]
        assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_the_node_and_the_replicas_are_configured_as_the_store_understands(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        monkeypatch.delenv(name)
    loaded = {}
    for service in ("node", "replica-0", "replica-1"):
        with monkeypatch.context() as patch:
            for name, value in compose["services"][service]["environment"].items():
                if name.startswith("KVSTORE_"):
                    patch.setenv(name, value)
            loaded[service] = Config.load()

    assert loaded["node"].redis.url is not None
    assert loaded["node"].service.http_names == "node"
    assert loaded["replica-0"].service.url == loaded["replica-1"].service.url == "unix:///run/kvstore/kvstore.sock"


def test_the_router_has_every_replica(compose: dict[str, Any]) -> None:
    arguments = dict(ours(compose))["router"]
    urls = [value for option, value in pairwise(arguments) if option == "--replica"]

    assert urls == [f"http://{name}:8000" for name in compose["services"] if name.startswith("replica-")]


def test_only_loopback_is_published(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]

    assert len(published) == 4
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_prometheus_scrapes_every_server_of_the_compose_file(compose: dict[str, Any]) -> None:
    targets = scraped("prometheus.yml")

    assert {target.partition(":")[0] for target in targets} == {"node", "replica-0", "replica-1", "router"}
    for name, arguments in ours(compose):
        if "--port" in arguments:
            assert f"{name}:{arguments[arguments.index('--port') + 1]}" in targets


def test_prometheus_scrapes_the_processes_of_a_cluster_by_default() -> None:
    ports = assign_ports(8000, 2, 1)

    assert scraped("processes.yml") == {f"127.0.0.1:{p}" for p in (ports.router, *ports.replicas, *ports.nodes)}


def scraped(name: str) -> set[str]:
    jobs = yaml.safe_load((ROOT / "deploy" / "prometheus" / name).read_text())["scrape_configs"]
    return {target for job in jobs for config in job["static_configs"] for target in config["targets"]}


# ---- the dashboard of Grafana ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def exported() -> set[str]:
    """Every sample name that node, replica and router have on /metrics."""
    replica = ReplicaMetrics()
    replica.attach(Admission(1, 1), num_running=lambda: 0, num_queued=lambda: 0, store=None)
    names = {metric.name for metric in METRICS}
    for text in (replica.render(), RouterMetrics([]).render()):
        for _, _, name, kind in (line.split() for line in text.decode().splitlines() if line.startswith("# TYPE ")):
            names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return names


def queries(panels: list[dict[str, Any]]) -> list[str]:
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_every_query_names_metrics_that_are_exported(panels: list[dict[str, Any]]) -> None:
    names = exported()

    asked = {name for query in queries(panels) for name in re.findall(r"kvstore_\w+", query)}

    assert len(asked) > 20
    assert asked <= names, asked - names


def test_queries_ask_for_labels_that_the_stores_metrics_have(panels: list[dict[str, Any]]) -> None:
    labels = {metric.name: set(metric.labels) | {"instance"} for metric in METRICS}
    checked = 0
    for query in queries(panels):
        for by, name in re.findall(r"by \(([\w, ]+)\) \((?:rate\()?(kvstore_\w+)", query):
            if name in labels:
                assert set(by.split(", ")) <= labels[name], query
                checked += 1

    assert checked > 5


def test_panels_have_ids_of_their_own_and_do_not_overlap(panels: list[dict[str, Any]]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells

    assert len({panel["id"] for panel in panels}) == len(panels)


def test_panels_ask_the_datasource_that_is_provisioned(panels: list[dict[str, Any]]) -> None:
    provisioned = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())

    asked = {panel["datasource"]["uid"] for panel in panels if "targets" in panel}
    assert asked == {source["uid"] for source in provisioned["datasources"]}


def test_grafana_finds_the_dashboard_where_it_is_mounted(compose: dict[str, Any]) -> None:
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "kvstore.yml").read_text())["providers"][0]
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])

    assert (ROOT / "deploy/grafana/dashboards").samefile(
        ROOT / next(source for source, target in mounts.items() if target == provider["options"]["path"])
    )
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
