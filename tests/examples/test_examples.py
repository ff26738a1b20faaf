"""The examples, as a newcomer runs them: installed by pip, used through configuration alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eviction.policy import EvictionPolicy
from kvstore.service.client.connect import connect
from kvstore.testing.contracts.policy import EvictionPolicyContract
from tests.helpers.daemons import Http
from tests.helpers.stores import LAYOUT, PAGE_BYTES, load, namespace, prompt, save, use
from tests.helpers.waiting import WAIT_S, wait_until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))
from policy import Lfu  # noqa: E402 - an example, found where its readers put it


class TestLfu(EvictionPolicyContract):
    def new_policy(self) -> EvictionPolicy[str]:
        return Lfu()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip has put the tier's distribution."""
    folder = tmp_path_factory.mktemp("site")
    source = shutil.copytree(EXAMPLES / "tier_package", folder / "source")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(folder / "site"), str(source)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return folder / "site"


def environment(*path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    return kept | {"PYTHONPATH": ":".join(map(str, (ROOT, *path)))}


def run(*arguments: str, path: tuple[Path, ...] = (), cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment(*path), cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_engine_hits_the_second_time(tmp_path: Path) -> None:
    arguments = (str(EXAMPLES / "engine.py"), f"disk.path={tmp_path / 'kv'}", "host.capacity_bytes=1MiB",
                 "store.load_or_recompute=false", "disk.capacity_bytes=1MiB")  # fmt: skip

    assert run(*arguments, cwd=tmp_path) == "loaded 0 of 10 blocks\n"
    assert run(*arguments, cwd=tmp_path) == "loaded 10 of 10 blocks\n"


def test_the_policy_is_named_in_the_configuration(tmp_path: Path) -> None:
    engine = (str(EXAMPLES / "engine.py"), "host.policy=policy:Lfu", "host.capacity_bytes=1MiB")

    assert run(*engine, path=(EXAMPLES,), cwd=tmp_path) == "loaded 0 of 10 blocks\n"


def test_a_store_uses_the_installed_tier_by_its_section_alone(site: Path, tmp_path: Path) -> None:
    code = (
        "from tests.helpers.stores import open_small, prompt, use, load\n"
        f"store = open_small(shelf={{'path': {str(tmp_path / 'shelf')!r}}}, host={{'capacity_bytes': 8 * 8192}},\n"
        "                   store={'load_or_recompute': False})\n"
        "for seed in range(4): use(store, prompt(6, seed)); assert store.flush(30)\n"
        "print(load(store, store.request(prompt(6, 0)))[1].by_tier)\n"
        "store.close()"
    )

    assert run("-c", code, path=(site,), cwd=tmp_path) == "{'shelf': 6}\n"


def test_a_section_of_a_tier_that_is_not_installed_is_told_with_what_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvstore", "config", "--set", "shelf.path=/x"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    told = " ".join(done.stderr.split())
    assert "shelf.path (from keyword argument) is unknown; no installed package provides tier shelf; " in told
    assert "installed: disk, redis" in told


def test_the_configuration_lists_its_fields(site: Path, tmp_path: Path) -> None:
    assert "shelf.capacity_bytes" in run("-m", "kvstore", "config", path=(site,), cwd=tmp_path)


@pytest.fixture
def daemon(site: Path, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A daemon with the tier: its socket, and its port for HTTP."""
    socket = tmp_path / "kv.sock"
    settings = (f"shelf.path={tmp_path / 'shelf'}", f"host.capacity_bytes={8 * PAGE_BYTES}", "service.http_port=0",
                "store.load_or_recompute=false", "store.lookup_deadline_s=10", "host.huge_pages=false")  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstore", "serve", "--socket", str(socket), *(f"--set={one}" for one in settings)],
        env=environment(site), cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        port, until = 0, time.monotonic() + WAIT_S
        lines = []
        while not socket.exists() or not port:
            lines.append(process.stderr.readline())
            assert process.poll() is None, "".join(lines)
            assert time.monotonic() < until, "".join(lines)
            if "http://127.0.0.1:" in lines[-1]:
                port = int(lines[-1].split("127.0.0.1:")[1].split("/")[0])
        yield socket, port
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)


def test_a_daemon_uses_detaches_and_attaches_the_installed_tier(daemon: tuple[Path, int]) -> None:
    socket, port = daemon
    http = Http(port)
    with connect(f"unix://{socket}", LAYOUT, namespace()) as store:
        wait_until(lambda: save(store, store.request(prompt(6, 0))) == 6)
        for seed in range(1, 4):
            use(store, prompt(6, seed))
            assert store.flush(WAIT_S)

        assert load(store, store.request(prompt(6, 0)))[1].by_tier == {"shelf": 6}
        assert {tier["tier"] for tier in http.get("/v1/tiers")["tiers"]} == {"host", "shelf"}
        assert "shelf" in http.get("/v1/openapi.json")["paths"]["/v1/tiers/{tier}/attach"]["post"]["parameters"][0][
            "schema"]["enum"]  # fmt: skip
        wait_until(lambda: "shelf" in {tier["tier"] for tier in http.get("/v1/dashboard/now")["tiers"]})
        http.post("/v1/tiers/shelf/detach")
        assert store.wait_lookup(store.request(prompt(6, 0))).by_tier.get("shelf", 0) == 0
        http.post("/v1/tiers/shelf/attach")
        assert {tier["tier"] for tier in http.get("/v1/tiers")["tiers"]} == {"host", "shelf"}
