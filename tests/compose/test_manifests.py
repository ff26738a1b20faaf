"""The manifests of engines, daemon and Redis cluster: valid by Kubernetes' own schemas, and fitting each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from kvstore.ports import free_ports
from kvstore.vllm.command import transfer_config
from tests.helpers.waiting import wait_until

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
VERSION = "1.31"  # the words used are in every later one
PASSWORD = "open-sesame"
NUM_NODES = 6


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((FOLDER / name).read_text()) if document]


def one(name: str, kind: str) -> dict[str, Any]:
    [found] = [document for document in documents(name) if document["kind"] == kind]
    return found


def pod_of(name: str, kind: str) -> dict[str, Any]:
    pod: dict[str, Any] = one(name, kind)["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_document_is_what_kubernetes_takes(path: Path) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

    for document in documents(path.name):
        schemas.validate(document, VERSION, strict=True)


def test_a_word_that_kubernetes_does_not_know_is_found() -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    service = one("redis.yaml", "Service")
    service["spec"]["clusterIp"] = "None"

    with pytest.raises(schemas.ValidationError):
        schemas.validate(service, VERSION, strict=True)


def test_engines_find_the_socket_of_their_nodes_daemon_as_its_user() -> None:
    engine, daemon = pod_of("engines.yaml", "Deployment"), pod_of("daemonset.yaml", "DaemonSet")
    [served], [container] = daemon["containers"], engine["containers"]
    config = json.loads(container["args"][container["args"].index("--kv-transfer-config") + 1])

    assert engine["securityContext"]["runAsUser"] == daemon["securityContext"]["runAsUser"]
    sockets = [{v["name"]: v for v in pod["volumes"]}["socket"]["hostPath"] for pod in (engine, daemon)]
    assert sockets[0] == sockets[1]
    url = config["kv_connector_extra_config"]["service"]["url"]
    assert url == "unix://" + served["args"][served["args"].index("--socket") + 1]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert url.startswith(f"unix://{mounts['socket']}/")
    # Also that a page which is gone by then is computed: by default it ends the request.
    assert config == transfer_config(config["kv_connector_extra_config"])


def test_no_service_defines_variables_that_a_daemon_or_an_engine_would_take_for_its_own() -> None:
    for name, kind in (("engines.yaml", "Deployment"), ("daemonset.yaml", "DaemonSet"), ("redis.yaml", "StatefulSet")):
        assert pod_of(name, kind)["enableServiceLinks"] is False


def test_a_redis_node_has_room_beside_its_pages() -> None:
    [container] = pod_of("redis.yaml", "StatefulSet")["containers"]
    settings = dict(line.split(" ", 1) for line in one("redis.yaml", "ConfigMap")["data"]["redis.conf"].splitlines())

    maxmemory = float(settings["maxmemory"].removesuffix("gb"))
    assert float(container["resources"]["requests"]["memory"].removesuffix("Gi")) >= 1.2 * maxmemory
    assert settings["maxmemory-policy"] == "allkeys-lfu"
    assert settings["maxmemory-clients"]


class Nodes:
    """The cluster's pods on this machine: files as a kubelet lays them out, every address the loopback's."""

    def __init__(self, home: Path) -> None:
        self.ports = free_ports(2 * NUM_NODES)
        self.home = home
        self._lay_out("config", one("redis.yaml", "ConfigMap")["data"])
        self._lay_out("secret", {"auth.conf": f"requirepass {PASSWORD}\nmasterauth {PASSWORD}\n"})
        [container] = pod_of("redis.yaml", "StatefulSet")["containers"]
        self.processes = [self._start(container, number) for number in range(NUM_NODES)]

    def create(self) -> None:
        """Run the job to its end."""
        [container] = pod_of("redis.yaml", "Job")["containers"]
        [nodes] = [entry["value"] for entry in container["env"] if entry["name"] == "NODES"]
        assert len(nodes.split()) == one("redis.yaml", "StatefulSet")["spec"]["replicas"] == NUM_NODES
        here = " ".join(f"127.0.0.1:{port}" for port in self.ports[:NUM_NODES])
        command = [self._inside(word) for word in container["command"]]
        done = subprocess.run(
            command, env={**os.environ, "NODES": here}, timeout=120, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def client(self) -> redis.RedisCluster:
        return redis.RedisCluster(host="127.0.0.1", port=self.ports[0], password=PASSWORD)

    def num_seen(self) -> int:
        with closing(self.client()) as client:
            return len(client.get_nodes())

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _lay_out(self, name: str, files: dict[str, str]) -> None:
        # Files lie in a directory of a moment, which a link names; the container sees links through that link.
        moment = self.home / name / "..2026_11_30_12_00_00.1"
        moment.mkdir(parents=True)
        (moment.parent / "..data").symlink_to(moment.name)
        for file, text in files.items():
            (moment / file).write_text(self._inside(text))
            (moment.parent / file).symlink_to(f"..data/{file}")

    def _inside(self, text: str) -> str:
        return text.replace("/etc/redis-secret", str(self.home / "secret")).replace(
            "/etc/redis", str(self.home / "config")
        )

    def _start(self, container: dict[str, Any], number: int) -> subprocess.Popen[bytes]:
        data = self.home / f"data-{number}"
        data.mkdir()
        # What the image's own /data would be is a directory of each node's here.
        config = (self.home / "config" / "redis.conf").read_text()
        assert "\ndir /data\n" in config
        (data / "redis.conf").write_text(config.replace("\ndir /data\n", f"\ndir {data}\n"))
        words = [self._inside(word).replace("$(POD_IP)", "127.0.0.1") for word in container["command"]]
        words[words.index(str(self.home / "config" / "redis.conf"))] = str(data / "redis.conf")
        ports = ("--port", str(self.ports[number]), "--cluster-port", str(self.ports[NUM_NODES + number]))
        return subprocess.Popen([*words, *ports], stdout=subprocess.DEVNULL)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    if shutil.which("redis-server") is None or shutil.which("redis-cli") is None:
        pytest.skip("redis-server and redis-cli are not installed")
    made = Nodes(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def test_the_job_makes_a_cluster_of_three_shards_once_and_a_second_time_changes_nothing(nodes: Nodes) -> None:
    nodes.create()

    wait_until(lambda: nodes.num_seen() == NUM_NODES, "each shard has its replica")
    with closing(nodes.client()) as cluster:
        owners = cluster.cluster_slots()
        assert len(owners) == 3
        assert cluster.config_get("maxmemory-policy")["maxmemory-policy"] == "allkeys-lfu"
        cluster.set("a page", b"bytes")
        nodes.create()
        assert cluster.cluster_slots() == owners
        assert cluster.get("a page") == b"bytes"
