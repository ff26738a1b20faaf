"""What policies have learned, on disk: whole or not at all, and a start from nothing for whatever else lies there."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eviction.outlook import Outlook
from eviction.policy import Belief
from eviction.ttl import Ttl
from kvstore import learned as module
from kvstore.build import attach_tier
from kvstore.config.sections import Config
from kvstore.learned import FOLDER, MAX_FILES, Learned, Unreadable, files_in, read_tables
from kvstore.plan.records import RequestOptions
from kvstore.store import LocalStore
from tests.helpers.stores import PAGE_BYTES, open_small, prompt, save
from tests.helpers.waiting import WAIT_S, wait_until

NAMESPACE = "0123456789abcdef" * 4
OUTLOOK = {"host": {"policy": "outlook"}, "store": {"load_or_recompute": False}}


class Counting(Outlook[Any]):
    """Tables of one number, and orders of a policy that is there anyway."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.number = number

    def tables(self) -> dict[str, Any]:
        return {"number": self.number}

    def restore(self, tables: dict[str, Any]) -> None:
        if set(tables) != {"number"}:
            raise ValueError("no such tables")
        self.number = tables["number"]

    def beliefs(self, tables: dict[str, Any]) -> list[Belief]:
        return []


def counting(number: int = 0) -> Ttl[Any]:
    return Ttl(Counting(number), name="counting")


def write(learned: Learned, number: int, tier: str = "host") -> None:
    learned.write({tier: ("counting", {"number": number})})


def restored(learned: Learned, tier: str = "host") -> int | None:
    """The number that a new policy begins with; None where it begins with nothing."""
    policy = counting(-1)
    assert policy.learner is not None
    return policy.learner.tables()["number"] if learned.restore(tier, policy) else None


@pytest.fixture
def learned(tmp_path: Path) -> Learned:
    return Learned(tmp_path, NAMESPACE, 16)


# ---- files


def test_what_was_written_is_restored(learned: Learned, tmp_path: Path) -> None:
    write(learned, 7)
    write(learned, 8, "disk")

    again = Learned(tmp_path, NAMESPACE, 16)

    assert (restored(again), restored(again, "disk"), restored(again, "other")) == (7, 8, None)
    assert (learned.num_written, learned.num_failed, again.unread) == (2, 0, {})
    assert [path.stat().st_mode & 0o777 for path in files_in(tmp_path)] == [0o600, 0o600]


def test_nothing_is_written_where_nothing_has_changed(learned: Learned) -> None:
    write(learned, 7)
    write(learned, 7)
    assert learned.num_written == 1
    write(learned, 8)
    assert learned.num_written == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda path: Learned(path, "f" * 64, 16),
        lambda path: Learned(path, NAMESPACE[:-1] + "0", 32),
    ],
)
def test_another_namespace_or_block_size_begins_with_nothing(
    learned: Learned, tmp_path: Path, other: Callable[[Path], Learned]
) -> None:
    write(learned, 7)
    assert restored(other(tmp_path)) is None


def test_another_policy_begins_with_nothing(learned: Learned, tmp_path: Path) -> None:
    write(learned, 7)
    again = Learned(tmp_path, NAMESPACE, 16)

    assert not again.restore("host", Ttl(Outlook(), name="outlook"))

    assert again.unread == {"other": 1}
    assert restored(again) == 7, "the file is as it was"


def test_a_file_that_was_cut_short_or_changed_anywhere_is_no_error(learned: Learned, tmp_path: Path) -> None:
    write(learned, 7)
    (path,) = files_in(tmp_path)
    whole = path.read_bytes()

    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert restored(learned) is None
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert restored(learned) is None
    path.write_bytes(whole + b" ")
    assert restored(learned) is None
    path.write_bytes(whole)
    assert restored(learned) == 7
    assert learned.unread.total() == 2 * len(whole) + 1


def test_a_file_of_another_format_is_told_apart(
    learned: Learned, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(learned, 7)
    (path,) = files_in(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"tables 1", b"tables 2", 1))

    assert restored(learned) is None

    assert learned.unread == {"version": 1}
    assert "its format is b'2', this release reads 1" in caplog.text


@pytest.mark.parametrize("body", [b"5", b"{}", b'{"tier": 1}', b"[" * 100_000, b'{"number": 7}'])
def test_what_another_program_wrote_with_a_right_checksum_is_no_error(
    learned: Learned, tmp_path: Path, body: bytes
) -> None:
    from hashlib import sha256

    write(learned, 7)
    (path,) = files_in(tmp_path)
    path.write_bytes(b"kvstore-policy-tables 1 " + sha256(body).hexdigest().encode() + b"\n" + body)

    assert restored(learned) is None
    assert learned.unread == {"broken": 1}


def test_a_policy_that_refuses_its_tables_begins_with_nothing(learned: Learned) -> None:
    learned.write({"host": ("counting", {"no number": 7})})

    assert restored(learned) is None
    assert learned.unread == {"broken": 1}


def test_a_file_that_is_a_link_or_open_to_all_is_not_read(learned: Learned, tmp_path: Path) -> None:
    write(learned, 7)
    (path,) = files_in(tmp_path)
    path.chmod(0o666)
    assert restored(learned) is None
    path.chmod(0o600)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert restored(learned) is None
    assert learned.unread == {"broken": 2}


def test_what_cannot_be_written_is_told_once_and_counted(
    learned: Learned, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FOLDER).write_text("a file in its place")

    with caplog.at_level(logging.WARNING):
        write(learned, 1)
        write(learned, 2)
    assert (learned.num_failed, learned.num_written) == (2, 0)
    assert caplog.text.count("cannot be written") == 1
    (tmp_path / FOLDER).unlink()
    write(learned, 3)
    assert restored(learned) == 3


def test_tables_that_are_none_for_json_or_too_large_are_not_written(
    learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    for odd in ({"x": float("nan")}, {"x": object()}, {"x": "long" * 10_000}):
        learned.write({"host": ("counting", odd)})
    assert learned.num_failed == 3
    assert files_in(tmp_path) == []
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_files_of_namespaces_that_are_gone_do_not_pile_up(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 20):
        write(Learned(tmp_path, f"{number:064}"[::-1], 16), number)
    assert len(files_in(tmp_path)) <= MAX_FILES + 1
    assert restored(Learned(tmp_path, f"{MAX_FILES + 19:064}"[::-1], 16)) == MAX_FILES + 19


WRITER = """
import sys
from pathlib import Path
from kvstore.learned import Learned
learned = Learned(Path(sys.argv[1]), sys.argv[2], 16)
number = 0
while True:
    number += 1
    learned.write({"host": ("counting", {"number": number})})
    print(learned.num_written, flush=True)
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), NAMESPACE], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(50):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()

        assert (restored(Learned(tmp_path, NAMESPACE, 16)) or 0) >= 50
    late = Learned(tmp_path, NAMESPACE, 16, now=lambda: 1e12)
    write(late, 1)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [path.name for path in files_in(tmp_path)]


# ---- a store


def teach(store: LocalStore, first: int = 0, sessions: int = 20) -> None:
    for seed in range(first, first + sessions):
        request = store.request(prompt(3, seed), RequestOptions(session=f"s{seed}"))
        store.lookup(request)
        save(store, request)
        store.keep.finished(request, finish_reason="tool_calls")


def seen(store: LocalStore) -> float:
    """Observations of all blocks in host memory."""
    (host,) = [one for one in store.admin.beliefs() if one.tier == "host"]
    return max((one.seen for one in host.beliefs or ()), default=0.0)


def test_a_store_goes_on_with_what_the_one_before_it_learned(tmp_path: Path) -> None:
    with open_small(tmp_path, **OUTLOOK) as store:
        teach(store)
        before = seen(store)
    assert before > 0

    with open_small(tmp_path, **OUTLOOK) as store:
        assert seen(store) == pytest.approx(before)
        assert store.stats()["tables_unread"] == {}
        teach(store, first=100)
        assert seen(store) > before


STORE = """
import sys
from pathlib import Path
from tests.kvstore.test_learned import OUTLOOK, teach
from tests.helpers.stores import open_small
store = open_small(Path(sys.argv[1]), **OUTLOOK)
teach(store)
store._learned_writer.write_now()
teach(store, first=1000)
print("taught", flush=True)
sys.stdin.read()
"""


def test_a_store_that_was_killed_goes_on_with_what_was_written_last(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    child = subprocess.Popen(
        [sys.executable, "-c", STORE, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "taught\n"
    child.send_signal(signal.SIGKILL)
    child.wait()

    with open_small(tmp_path, **OUTLOOK) as store:
        assert seen(store) == pytest.approx(20 * 3), "what was taught after the last write is lost"


def test_a_broken_file_is_a_start_from_nothing_that_is_counted(tmp_path: Path) -> None:
    with open_small(tmp_path, **OUTLOOK) as store:
        teach(store)
    (path,) = files_in(tmp_path)
    path.write_bytes(path.read_bytes()[:-7])

    with open_small(tmp_path, **OUTLOOK) as store:
        assert seen(store) == 0
        assert store.stats()["tables_unread"] == {"broken": 1}
        teach(store)
    assert read_tables(path).tier == "host", "and it is written anew"


def test_it_is_written_now_and_then_without_a_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.move.learned_writer.WRITE_EVERY_S", 0.01)
    with open_small(tmp_path, **OUTLOOK) as store:
        teach(store)
        wait_until(lambda: store.stats()["tables_written"], lambda: "nothing was written")
        assert files_in(tmp_path)


def test_tiers_that_learn_have_a_file_each(tmp_path: Path) -> None:
    with open_small(tmp_path, **OUTLOOK, disk={"policy": "outlook"}) as store:
        teach(store)
    assert [path.name.split("-")[0] for path in files_in(tmp_path)] == ["disk", "host"]


def test_a_tier_that_is_detached_and_comes_back_goes_on_with_what_it_learned(tmp_path: Path) -> None:
    sections = {**OUTLOOK, "disk": {"policy": "outlook"}}
    with open_small(tmp_path, **sections) as store:
        teach(store)
        before = {one.tier: one.beliefs for one in store.admin.beliefs()}
        assert before["disk"]

        assert store.admin.detach_tier("disk")
        config = Config(disk={"path": tmp_path, "capacity_bytes": 128 * PAGE_BYTES, "policy": "outlook"})
        attach_tier(store, config, "disk")

        assert {one.tier: one.beliefs for one in store.admin.beliefs()} == before


def test_where_no_policy_learns_there_is_no_thread_and_no_folder(tmp_path: Path) -> None:
    with open_small(tmp_path) as store:
        teach(store)
        assert "kvstore-learned" not in [thread.name for thread in threading.enumerate()]
        assert [(one.tier, one.policy, one.beliefs) for one in store.admin.beliefs()] == [
            ("host", "lru", None),
            ("disk", "lru", None),
        ]
    assert not (tmp_path / FOLDER).exists()


def test_without_a_directory_nothing_is_kept() -> None:
    with open_small(**OUTLOOK) as store:
        teach(store)
        assert seen(store) > 0
        assert "tables_written" not in store.stats()


def test_a_policy_whose_tables_fail_costs_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_small(tmp_path, **OUTLOOK) as store:
        monkeypatch.setattr(Outlook, "tables", lambda self: 1 / 0)
        teach(store)
        assert store._learned_writer is not None
        store._learned_writer.write_now()
        assert store.stats()["tables_failed"] == 1


def test_tables_are_taken_under_the_lock_and_written_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    could_lock: list[bool] = []
    with open_small(tmp_path, **OUTLOOK) as store:
        teach(store)

        def write(*_: object) -> None:
            could_lock.append(store._lock.acquire(timeout=WAIT_S))
            store._lock.release()

        monkeypatch.setattr(module, "_write", write)
        assert store._learned_writer is not None
        store._learned_writer.write_now()
    assert could_lock[0]


def test_a_file_is_told_apart_from_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.tables"
    path.write_text(json.dumps({"tier": "host"}))
    path.chmod(0o600)
    with pytest.raises(Unreadable, match="no file of tables"):
        read_tables(path)
