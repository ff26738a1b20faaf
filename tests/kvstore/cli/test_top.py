"""`kvstore top` against a daemon in this process."""

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.cli.top_view import TopView
from kvstore.plan.records import RequestOptions
from kvstore.service.dashboard.client import DashboardClient
from tests.helpers.daemons import LocalDaemon, attach, local_daemon
from tests.helpers.hints import envelope
from tests.helpers.stores import PAGE_BYTES, ids, prompt, save, use
from tests.helpers.waiting import WAIT_S, wait_until


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    with local_daemon(tmp_path / "kv.sock", tmp_path / "disk", service={"http_port": 0}) as daemon:
        yield daemon


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["top", *arguments])
    return result.exit_code, result.output


def shown(view: TopView, width: int = 100) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(view)
    return console.export_text()


def test_a_pipe_gets_the_essentials_once(daemon: LocalDaemon, tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock") as store:
        for _ in range(2):
            use(store, prompt(5), RequestOptions(session="chat 3"))
        daemon.look(lambda d: d.dashboard.sample())

        for url in (f"unix://{tmp_path / 'kv.sock'}", f"http://127.0.0.1:{daemon.daemon.app.port}"):
            code, output = run(url)

            assert code == 0
            for words in ("1 client", "hit rate", "49.4%", "40 KiB", "chat 3", "never stored", "disk", "up"):
                assert words in output, words


def test_a_tier_that_is_not_configured_has_no_line(daemon: LocalDaemon, tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock") as store:
        use(store, prompt(5))
        daemon.look(lambda d: d.dashboard.sample())

        output = run(f"unix://{tmp_path / 'kv.sock'}")[1]

    assert re.findall(r"^   (\w+)  +\S+ ", output, re.MULTILINE)[:2] == ["host", "disk"]
    assert "redis" not in output


def test_an_unused_daemon_teaches_what_to_run(daemon: LocalDaemon, tmp_path: Path) -> None:
    code, output = run(f"unix://{tmp_path / 'kv.sock'}", "--once")

    assert code == 0
    assert f"KVSTORE_SERVICE__URL=unix://{tmp_path / 'kv.sock'}" in output


def test_a_daemon_that_is_not_there_is_told_with_the_next_step(tmp_path: Path) -> None:
    code, output = run(f"unix://{tmp_path / 'none.sock'}")

    assert code == 2
    assert "no such file or directory; is a daemon running there? (kvstore serve)" in output


def test_a_url_that_is_none_is_told(tmp_path: Path) -> None:
    code, output = run("localhost:8470")

    assert code == 2
    assert "URL is 'localhost:8470'; it must be unix:///path/of/socket, http://host:port" in output.replace("\n", " ")


def test_a_token_is_asked_for_and_taken(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('[[tenant]]\nname = "blue"\ntoken = "blue-token-0123456789"\n')
    tokens.chmod(0o600)
    with local_daemon(tmp_path / "kv.sock", service={"http_port": 0, "tokens_file": tokens}) as daemon:
        url = f"http://127.0.0.1:{daemon.daemon.app.port}"

        code, output = run(url)
        assert code == 2
        assert "wants a token: give --token, or set KVSTORE_SERVICE__TOKEN" in output

        code, output = run(url, "--token", "blue-token-0123456789")
        assert code == 0
        assert "tenant blue" in output


def test_a_tier_that_is_down_is_told(daemon: LocalDaemon, tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock") as store:
        use(store, prompt(3))
        (opened,) = daemon.look(lambda d: d.stores.all())
        breaker = opened.store._dispatcher.lanes["disk"].breaker
        breaker._probe_after_s = breaker._backoff_s = 1000.0  # else it may be back before anybody looks
        breaker.trip()
        daemon.look(lambda d: d.dashboard.sample())

        code, output = run(f"unix://{tmp_path / 'kv.sock'}")

    assert code == 0
    assert re.search(r"DOWN for \d+ s", output)


def test_names_from_clients_cannot_move_the_cursor(daemon: LocalDaemon, tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock") as store:
        use(store, prompt(3), RequestOptions(session="a\x1b[2Jb[red]"))
        daemon.look(lambda d: d.dashboard.sample())

        view = TopView.ask(DashboardClient(f"unix://{tmp_path / 'kv.sock'}"), span_s=60.0)

        assert "a?[2Jb[red]" in shown(view)
        assert "\x1b[2J" not in shown(view)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits_the_terminal(daemon: LocalDaemon, tmp_path: Path, width: int) -> None:
    with attach(tmp_path / "kv.sock") as store:
        use(store, prompt(3), RequestOptions(session="a conversation with a rather long name"))
        daemon.look(lambda d: d.dashboard.sample())
        view = TopView.ask(DashboardClient(f"unix://{tmp_path / 'kv.sock'}"), span_s=60.0)

    assert max(len(line) for line in shown(view, width).splitlines()) <= width


def test_in_a_terminal_it_follows_until_it_is_interrupted(daemon: LocalDaemon, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstore", "top", f"unix://{tmp_path / 'kv.sock'}"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "50"},
    )
    os.close(slave)
    os.set_blocking(master, False)
    seen = b""

    def sees(words: bytes) -> bool:
        nonlocal seen
        try:
            seen += os.read(master, 1 << 16)
        except BlockingIOError:
            time.sleep(0.05)
        return words in seen

    try:
        wait_until(lambda: sees(b"Nothing has been asked yet"))
        with attach(tmp_path / "kv.sock") as store:
            use(store, prompt(4), RequestOptions(session="chat 9"))
            wait_until(lambda: sees(b"chat 9"))
        process.send_signal(2)
        wait_until(lambda: sees(b"\x1b[?1049l"))  # the screen that was there before is back
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_a_write_budget_and_pages_lost_to_it_are_told(tmp_path: Path) -> None:
    disk = {"shared": False, "exclusive": True, "max_writes_per_day": 24 * 4 * PAGE_BYTES}
    with (
        local_daemon(tmp_path / "kv.sock", tmp_path / "disk", service={"http_port": 0}, disk=disk) as daemon,
        attach(tmp_path / "kv.sock") as store,
    ):
        for seed in range(8):  # twice what host memory holds; the hour's share of writes is four pages
            save(store, store.request(prompt(16, seed)))
        daemon.look(lambda d: d.dashboard.sample())
        tiers = DashboardClient(f"unix://{tmp_path / 'kv.sock'}").get("now")["tiers"]
        _, output = run(f"unix://{tmp_path / 'kv.sock'}")

    host, told = tiers
    assert host["budget"] is None
    assert told["budget"]["bytes_per_day"] == 24 * 4 * PAGE_BYTES
    assert told["budget"]["is_spent"]
    assert told["lost_pages"] >= 32
    words = " ".join(output.split())
    assert f"{told['lost_pages']} pages lost to it" in words
    assert "write budget of 768 KiB a day is spent, spent 1 times" in words


def test_who_keeps_what_until_when_is_told(daemon: LocalDaemon, tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock", client="agent") as store:
        use(store, prompt(5))
        store.hint(envelope(("pin", {"tokens": ids(5), "session": "chat 3"})))
        daemon.look(lambda d: d.dashboard.sample())

        output = run(f"unix://{tmp_path / 'kv.sock'}")[1]

    assert re.search(r"agent \(client \d+\), session chat 3 +40 KiB +\d\d:\d\d:\d\d", output), output
