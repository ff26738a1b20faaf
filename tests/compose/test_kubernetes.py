"""The daemonset's files, users and requests laid out as a kubelet does; no Kubernetes is needed, but root is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvstore.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "deploy" / "kubernetes" / "daemonset.yaml"
SCRAPE = ROOT / "deploy" / "prometheus" / "kubernetes.yml"
TOKEN = "the token of the operator"
TOKENS = f'[[tenant]]\nname = "prometheus"\ntoken = "{TOKEN}"\noperator = true\n'
# In a mount namespace: what another user could not reach below a closed directory (an interpreter in root's home) is
# shown in an open one; then the root is read-only but for the volumes. Takes CLOSED VOLUMES NEEDED.. -- COMMAND...
POD_ROOT = """
mount --make-rprivate /
closed=$1 volumes=$2; shift 2
if [ -n "$closed" ]; then
    stage=$(mktemp -d)
    mount --rbind "$closed" "$stage"
    mount -t tmpfs -o mode=755 none "$closed"
fi
while [ "$1" != -- ]; do
    mkdir -p "$1" && mount --rbind "$stage${1#"$closed"}" "$1"
    shift
done
shift
mount --bind "$volumes" "$volumes"
mount -o remount,ro,bind /
exec "$@"
"""
START_S = 90.0  # a generous bound: machines are busy
SMALL = {"KVSTORE_HOST__CAPACITY_BYTES": "16MiB", "KVSTORE_DISK__CAPACITY_BYTES": "64MiB"}


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())["spec"]["template"]["spec"]
    return made


def in_pod(pod: dict[str, Any], home: Path) -> list[str]:
    """The start of a command that runs as in the pod: read-only root, its user, fsGroup, no capabilities."""
    context = pod["securityContext"]
    needed = {Path(sys.base_prefix), Path(sys.prefix), ROOT}
    closed = {p for path in needed for p in [*path.parents, path] if not p.stat().st_mode & 0o001}
    top = min(closed, key=lambda path: len(path.parts), default=None)  # in practice there is one: root's home
    below = sorted(str(path) for path in needed if top is not None and path.is_relative_to(top))
    return [
        *("unshare", "--mount", "sh", "-ec", POD_ROOT, "sh", str(top or ""), str(home), *below, "--"),
        "setpriv",
        f"--reuid={context['runAsUser']}",
        f"--regid={context['runAsGroup']}",
        f"--groups={context['fsGroup']}",
        "--bounding-set=-all",
        "--no-new-privs",
    ]


class Node:
    """A node's directories and the pod's volumes below `home`, and where the pod's mount points are."""

    def __init__(self, home: Path, pod: dict[str, Any]) -> None:
        self.pod = pod
        self.command = in_pod(pod, home)
        self.volumes: dict[str, Path] = {}
        for volume in pod["volumes"]:
            path = home / volume["name"]
            if "hostPath" in volume:  # DirectoryOrCreate: root's, 0755, whatever fsGroup says
                path.mkdir()
                path.chmod(0o755)
            elif "secret" in volume:
                self._lay_out_secret(path, volume["secret"]["defaultMode"], pod["securityContext"]["fsGroup"])
            else:  # emptyDir: the pod's group may write
                path.mkdir()
                os.chown(path, 0, pod["securityContext"]["fsGroup"])
                path.chmod(0o2777)
            self.volumes[volume["name"]] = path

    @staticmethod
    def _lay_out_secret(path: Path, mode: int, group: int) -> None:
        # Files lie in a directory of a moment, which a link names; what the pod opens is a link through that link. The
        # group gets read rights: kubernetes/kubernetes#57923.
        moment = path / "..2026_11_29_12_00_00.123456789"
        moment.mkdir(parents=True)
        file = moment / "tokens.toml"
        file.write_text(TOKENS)
        file.chmod(mode | 0o440)
        (path / "..data").symlink_to(moment.name)
        (path / "tokens.toml").symlink_to("..data/tokens.toml")
        for made in (path, moment, file):
            os.chown(made, 0, group)
        for made in (path, moment):
            made.chmod(0o2750)

    def inside(self, text: str, container: dict[str, Any]) -> str:
        """A path of the container as one of this machine."""
        for mount in container["volumeMounts"]:
            if (text + "/").startswith(mount["mountPath"] + "/"):
                return str(self.volumes[mount["name"]]) + text[len(mount["mountPath"]) :]
        return text


@pytest.fixture
def node(pod: dict[str, Any]) -> Iterator[Node]:
    if os.getuid() != 0:
        pytest.skip("only root can become the pod's user")
    # Not pytest's own directory: that one is closed to other users, and every run closes it again.
    with tempfile.TemporaryDirectory(prefix="kvstore-node-") as directory:
        home = Path(directory)
        home.chmod(0o755)
        made = Node(home, pod)
        if subprocess.run([*made.command, "true"], capture_output=True, check=False).returncode != 0:
            pytest.skip("no mount namespace can be made here")
        yield made


@pytest.fixture
def daemon(node: Node) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """The manifest's init container, then its container, with sizes of a test; the process, HTTP port and socket."""
    [first] = node.pod["initContainers"]
    subprocess.run([node.inside(word, first) for word in first["command"]], check=True)
    [container] = node.pod["containers"]
    port = free_port()
    environment = {entry["name"]: node.inside(entry["value"], container) for entry in container["env"]} | SMALL
    arguments = [node.inside(word, container) for word in container["args"]]
    log = node.volumes["tmp"] / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*node.command, sys.executable, "-m", "kvstore", *arguments],
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": str(ROOT),
                "KVSTORE_SERVICE__HTTP_PORT": str(port),
                **environment,
            },
            cwd=node.volumes["tmp"],  # the image's working directory is read-only
            stdout=out,
            stderr=out,
        )
    try:
        yield process, port, Path(arguments[arguments.index("--socket") + 1])
    finally:
        process.kill()
        process.wait()


def ask(port: int, path: str, token: str = "") -> tuple[int, bytes]:
    """A request as a kubelet or Prometheus sends it: by the pod's address, which the Host header repeats."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Host": f"10.244.1.7:{port}", "User-Agent": "kube-probe/1.31", "Accept": "*/*", "Connection": "close"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def wait_until_probes_pass(process: subprocess.Popen[bytes], port: int, probes: list[str], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if all(200 <= ask(port, path)[0] < 400 for path in probes):
                return
        except OSError:
            pass
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_the_daemon_starts_as_a_kubelet_starts_it_and_ends_at_sigterm(
    node: Node, daemon: tuple[subprocess.Popen[bytes], int, Path]
) -> None:
    process, port, listening = daemon
    [container] = node.pod["containers"]
    probes = [container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")]

    wait_until_probes_pass(process, port, probes, node.volumes["tmp"] / "log")

    assert listening.is_socket()
    assert ask(port, "/metrics")[0] == 401
    status, body = ask(port, "/metrics", TOKEN)
    assert status == 200
    assert b"kvstore_" in body
    process.send_signal(signal.SIGTERM)
    assert process.wait(node.pod["terminationGracePeriodSeconds"]) == 0
    assert TOKEN not in (node.volumes["tmp"] / "log").read_text()


def test_nothing_is_announced_that_needs_a_token() -> None:
    template = yaml.safe_load(MANIFEST.read_text())["spec"]["template"]
    [job] = yaml.safe_load(SCRAPE.read_text())["scrape_configs"]

    assert not any("prometheus.io" in name for name in template["metadata"].get("annotations", {}))
    assert job["authorization"]["credentials_file"]


def test_the_images_are_those_of_compose(pod: dict[str, Any]) -> None:
    compose = (ROOT / "docker-compose.yml").read_text()

    for container in (*pod["initContainers"], *pod["containers"]):
        assert f":-{container['image']}}}" in compose


def test_what_the_daemon_writes_lies_in_volumes_that_may_be_written(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    [first] = pod["initContainers"]
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    written = [environment["KVSTORE_DISK__PATH"], container["args"][container["args"].index("--socket") + 1]]

    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert all(any(path.startswith(place + "/") for place in writable) for path in written)
    assert environment["KVSTORE_DISK__PATH"] in first["command"]


def test_every_document_of_deployment_is_named_in_the_docs() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()

    for path in (
        "deploy/systemd/kvstore.service",
        "deploy/kubernetes/daemonset.yaml",
        "deploy/kubernetes/engines.yaml",
        "deploy/kubernetes/redis.yaml",
        "deploy/prometheus/kubernetes.yml",
    ):
        assert path in text
        assert (ROOT / path).is_file()
