from __future__ import annotations

import os
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from kvstore.cluster.supervisor_directory import RunDirectory
from kvstore.cluster.topology import ProcessKind
from tests.helpers.clusters import a_spec, stand_in


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "clusters", "test")
    directory.create(a_spec())
    return directory


def test_a_spec_is_read_as_it_was_written(run: RunDirectory) -> None:
    spec = replace(a_spec(), redis="redis://:secret@h:1/0", settings=("a.b=c", "d.e=f"), disk="/d", threads=3)

    run.create(spec)

    assert run.read() == spec


def test_what_may_hold_a_password_is_its_owners_alone(run: RunDirectory) -> None:
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (run.path, run.path / "cluster.json")]

    assert modes == [0o700, 0o600]


def test_clusters_are_listed_by_name_until_they_are_forgotten(run: RunDirectory) -> None:
    RunDirectory(run.parent, "another").create(a_spec("another"))

    assert [one.name for one in RunDirectory.all(run.parent)] == ["another", "test"]
    run.forget()
    assert [one.name for one in RunDirectory.all(run.parent)] == ["another"]
    assert run.read() is None


def test_a_process_is_known_as_soon_as_it_runs(run: RunDirectory) -> None:
    with run.spawn(stand_in("node-0", ProcessKind.NODE, 0), dict(os.environ)) as child:
        found = run.find("node-0")
        child.kill()

    assert found is not None
    assert found.pid == child.pid
    assert run.find("node-0") is None


def test_no_process_starts_once_the_directory_is_gone(run: RunDirectory, tmp_path: Path) -> None:
    """As it would if `up` were killed, and `down` finished, between the fork and the program."""
    from kvstore.cluster.supervisor_directory import STUB

    shutil.rmtree(run.path)
    mark = tmp_path / "ran"

    done = subprocess.run(
        ["/bin/sh", "-c", STUB, str(run.path / "x.pid"), "touch", str(mark)], capture_output=True, check=False
    )

    assert done.returncode != 0
    assert not mark.exists()


def test_a_directory_with_somebody_in_it_is_not_deleted(run: RunDirectory) -> None:
    with run.spawn(stand_in("node-0", ProcessKind.NODE, 0), dict(os.environ)) as child:
        left = run.remove()
        assert {name: process.pid for name, process in left.items()} == {"node-0": child.pid}
        assert run.find("node-0") == psutil.Process(child.pid)
        child.kill()

    assert run.remove() == {}
    assert not run.path.exists()


@pytest.mark.parametrize("text", ["", "abc", "999999999"])
def test_a_pid_file_that_says_nothing_is_nobody(run: RunDirectory, text: str) -> None:
    (run.path / "node-0.pid").write_text(text)

    assert run.find("node-0") is None


def test_the_lock_is_held_by_one_and_tells_by_whom(run: RunDirectory) -> None:
    with run.lock(1234) as first, run.lock(5678) as second:
        assert (first, second) == (None, 1234)
    with run.lock(5678) as again:
        assert again is None


def test_last_words_have_those_of_the_engines_own_server(run: RunDirectory) -> None:
    run.log("replica-0").write_text("starting\n")
    (run.path / "replica-0.engine.log").write_text("".join(f"engine {number}\n" for number in range(40)))

    told = run.last_words("replica-0").splitlines()

    assert told[0] == "    starting"
    assert told[1] == f"    the end of {run.path}/replica-0.engine.log:"
    assert told[2:] == [f"    engine {number}" for number in range(28, 40)]


def test_last_words_are_the_end_of_the_log(run: RunDirectory) -> None:
    run.log("node-0").write_text("".join(f"line {index}\n" for index in range(40)))

    assert run.last_words("node-0").splitlines()[-1] == "    line 39"
    assert len(run.last_words("node-0").splitlines()) == 12
    assert run.last_words("nobody") == "    (there is none)"
