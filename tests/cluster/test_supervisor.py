"""Bringing up and taking down, with stand-ins for the processes; test_supervisor_cluster.py has the real ones."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kvstore.cluster import supervisor as module
from kvstore.cluster import supervisor_ports
from kvstore.cluster.supervisor import Supervisor, brought_up, interruptible, take_down
from kvstore.cluster.supervisor_directory import ClusterError, RunDirectory
from kvstore.cluster.topology import Process
from tests.helpers.clusters import a_spec, stand_ins
from tests.helpers.waiting import WAIT_S

Plan = Callable[..., tuple[Process, ...]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    directory = RunDirectory(tmp_path, "test")
    yield directory
    take_down(directory)
    while reap_one():
        pass


def reap_one() -> bool:
    """Wait for a child that has ended and that nobody waits for any more."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Says what every Supervisor of this test is made of."""

    def use(**modes: str) -> tuple[Process, ...]:
        processes = stand_ins(**modes)
        monkeypatch.setattr(module, "plan", lambda *_: processes)
        return processes

    return use


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_processes_start_in_the_order_of_their_needs_and_are_ready(run: RunDirectory, plan: Plan) -> None:
    plan()
    said: list[str] = []

    with brought_up(a_spec(), run, said.append) as supervisor:
        rows = supervisor.status()

    assert [line.split()[0] for line in said if " ready " in line] == ["node-0", "replica-0", "router"]
    assert said[1] == "loading the model: replica-0"
    assert [(row.name, row.state) for row in rows] == [("node-0", "ready"), ("replica-0", "ready"), ("router", "ready")]
    assert all(row.rss_bytes and psutil.Process(row.pid).cwd() == str(run.path) for row in rows)


def test_a_cluster_stays_up_when_the_block_ends_and_another_run_takes_it_down(run: RunDirectory, plan: Plan) -> None:
    plan()
    with brought_up(a_spec(), run):
        pass
    pids = [process.pid for process in run.running().values()]

    count = take_down(run)

    assert (count, len(pids)) == (3, 3)
    assert all(map(is_gone, pids))
    assert not run.path.exists()


def test_the_end_goes_the_other_way_round(run: RunDirectory, plan: Plan) -> None:
    plan(replica="stubborn")
    with brought_up(a_spec(), run) as supervisor:
        supervisor.stop(["router"])
        assert sorted(run.running()) == ["node-0", "replica-0"]

        # The replica will not end: the node must not be asked before it has.
        nodes: list[bool] = []
        supervisor._tell = lambda _: nodes.append(run.find("node-0") is not None)
        supervisor.stop(timeout_s=0.2)

    assert nodes == [True]
    assert run.running() == {}


def test_what_does_not_end_is_killed_and_that_is_told(run: RunDirectory, plan: Plan) -> None:
    plan(node="stubborn")
    said: list[str] = []
    with brought_up(a_spec(), run, said.append) as supervisor:
        pid = supervisor.status()[0].pid
        supervisor.stop(timeout_s=0.2)

    assert said[-1] == "node-0 did not end within 0 s and is killed"
    assert pid is not None
    assert is_gone(pid)


def test_a_frozen_process_is_ended(run: RunDirectory, plan: Plan) -> None:
    plan()
    with brought_up(a_spec(), run):
        frozen = run.running()["replica-0"]
        frozen.suspend()

    assert take_down(run) == 3
    assert is_gone(frozen.pid)


def test_a_process_that_ends_is_told_with_the_end_of_its_log_and_nothing_is_left(run: RunDirectory, plan: Plan) -> None:
    plan(replica="ends")
    before = set(psutil.Process().children())

    with pytest.raises(ClusterError) as told, brought_up(a_spec(), run):
        pass

    assert "replica-0 ended with exit code 3 before it was ready" in str(told.value)
    assert f"{run.path}/replica-0.log:\n    this is ends" in str(told.value)
    assert [child for child in psutil.Process().children() if child not in before and not is_gone(child.pid)] == []
    assert run.read() is None
    assert run.log("replica-0").exists()


def test_a_process_that_does_not_get_ready_is_told(run: RunDirectory, plan: Plan) -> None:
    plan(replica="never")

    with pytest.raises(ClusterError, match="replica-0 is not ready after 1 s"), brought_up(a_spec(), run, timeout_s=1):
        pass


def test_it_comes_up_after_a_start_that_failed(run: RunDirectory, plan: Plan) -> None:
    plan(replica="ends")
    with pytest.raises(ClusterError), brought_up(a_spec(), run):
        pass
    plan()

    with brought_up(a_spec(), run):
        assert len(run.running()) == 3


def test_a_port_in_use_is_told_with_whose_it_is_and_by_whom(run: RunDirectory, plan: Plan) -> None:
    processes = plan()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", processes[1].port))
        taken.listen()
        with pytest.raises(ClusterError) as told, brought_up(a_spec(), run):
            pass

    assert f"port {processes[1].port}, for replica-0, is in use by process {os.getpid()}: " in str(told.value)
    assert "another --port" in str(told.value)
    assert run.running() == {}


def test_a_name_that_is_up_is_not_brought_up_again(run: RunDirectory, plan: Plan) -> None:
    plan()
    with brought_up(a_spec(), run):
        pass
    plan()

    with pytest.raises(ClusterError, match=r"'test' is up already; .* kvstore cluster down --name test"):
        brought_up(a_spec(), run).__enter__()
    assert len(run.running()) == 3


def test_an_interrupted_start_leaves_nothing(run: RunDirectory, plan: Plan) -> None:
    plan(replica="never")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("node-0 "):
            os.kill(os.getpid(), signal.SIGINT)

    with interruptible(), brought_up(a_spec(), run, say):
        pass

    assert said[1:] == ["ending the cluster"]
    assert not run.path.exists()


def test_standing_by_tells_of_an_end_and_of_a_return(
    run: RunDirectory, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan()
    monkeypatch.setattr(module, "STAND_STEP_S", 0.02)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "ended" in line:
            Supervisor(a_spec(), run).start(["replica-0"])
        if "is back" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with interruptible(), brought_up(a_spec(), run, say) as supervisor:
        run.running()["replica-0"].kill()
        supervisor.stand()

    ended, *rest = said[-3:]
    assert ended.startswith("replica-0 ended by SIGKILL; its log is ")
    assert ended.endswith("to start it again: kvstore cluster restart --name test replica-0")
    assert rest == ["replica-0 is back", "ending the cluster"]
    assert run.running() == {}


def test_a_terminal_that_is_gone_keeps_nothing_running(
    run: RunDirectory, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan()

    def say(line: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with interruptible(), brought_up(a_spec(), run, say) as supervisor:
        pids = [process.pid for process in run.running().values()]
        os.kill(os.getpid(), signal.SIGHUP)
        supervisor.stand()

    assert len(pids) == 3
    assert all(map(is_gone, pids))


def test_standing_by_ends_when_nobody_is_left(run: RunDirectory, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan()
    monkeypatch.setattr(module, "STAND_STEP_S", 0.02)
    with brought_up(a_spec(), run) as supervisor:
        Supervisor(a_spec(), run).stop()
        supervisor.stand()


def test_status_tells_what_ended_and_what_is_not_ready(
    run: RunDirectory, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_ports, "ASK_TIMEOUT_S", 0.2)
    plan()
    with brought_up(a_spec(), run) as supervisor:
        run.running()["router"].kill()
        run.running()["replica-0"].suspend()
        rows = supervisor.status()

    assert [(row.name, row.state) for row in rows] == [
        ("node-0", "ready"),
        ("replica-0", "not ready"),
        ("router", "ended"),
    ]


def test_somebody_else_with_the_pid_of_a_process_that_has_ended_is_left_alone(run: RunDirectory, plan: Plan) -> None:
    plan()
    with brought_up(a_spec(), run):
        pass
    stranger = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, cwd="/")
    try:
        run.running()["router"].kill()
        (run.path / "router.pid").write_text(f"{stranger.pid}\n")

        assert take_down(run) == 2
        assert stranger.poll() is None
    finally:
        stranger.communicate()


def test_down_ends_what_another_version_has_started(run: RunDirectory, plan: Plan) -> None:
    plan()
    with brought_up(a_spec(), run):
        pass
    pids = [process.pid for process in run.running().values()]
    (run.path / "cluster.json").write_text('{"model": "m", "from_the_future": 1}')

    assert take_down(run) == 3
    assert all(map(is_gone, pids))


@pytest.fixture
def up(run: RunDirectory) -> Iterator[subprocess.Popen[bytes]]:
    """An `up` that stands by its cluster, in a process of its own."""
    script = f"from tests.helpers.clusters import stand_by; stand_by({str(run.parent)!r})"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        yield process
        process.kill()


def test_down_asks_an_up_that_stands_by_to_end(run: RunDirectory, up: subprocess.Popen[bytes]) -> None:
    pids = [process.pid for process in run.running().values()]

    count = take_down(run)

    assert (count, len(pids)) == (3, 3)
    assert all(map(is_gone, pids))
    assert up.wait(WAIT_S) == 0


def test_down_does_the_work_of_an_up_that_was_killed(
    run: RunDirectory, up: subprocess.Popen[bytes], plan: Plan
) -> None:
    plan()
    pids = [process.pid for process in run.running().values()]
    up.kill()
    up.wait()
    assert not any(map(is_gone, pids))

    assert take_down(run) == 3
    assert all(map(is_gone, pids))
    assert not run.path.exists()


def test_down_is_no_error_where_nothing_is_up(run: RunDirectory) -> None:
    assert take_down(run) == 0


def test_signals_are_what_they_were_after_the_block() -> None:
    before = [signal.getsignal(number) for number in module.SIGNALS]

    with interruptible():
        os.kill(os.getpid(), signal.SIGHUP)
        pytest.fail("it went on")

    assert [signal.getsignal(number) for number in module.SIGNALS] == before
