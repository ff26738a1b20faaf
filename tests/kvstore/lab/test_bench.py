from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from kvstore.errors import ConfigError
from kvstore.lab import bench
from kvstore.lab.bench import QUICK_ROUNDS, ROUNDS, WORKLOADS, BenchWorkload, Case, Table, measure, report, run


class Clock:
    """Wall and CPU seconds that only `work` moves."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def work(self, wall: float, cpu: float) -> None:
        self.wall += wall
        self.cpu += cpu


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(perf_counter=lambda: clock.wall, process_time=lambda: clock.cpu)
    monkeypatch.setattr(bench, "time", fake)
    return clock


def test_speed_is_compared_with_the_first_case(clock: Clock) -> None:
    table = measure(
        "t",
        "bytes",
        [Case("ceiling", lambda: clock.work(1.0, 0.5), 100), Case("half", lambda: clock.work(2.0, 2.0), 100)],
    )

    ceiling, half = table.timings
    assert (ceiling.ratio, ceiling.per_s, ceiling.median_s, ceiling.cpu_s) == (1.0, 100.0, 1.0, 0.5)
    assert (half.ratio, half.per_s, half.median_s, half.cpu_s) == (0.5, 50.0, 2.0, 2.0)


def test_ratio_is_of_amounts_and_not_of_times_alone(clock: Clock) -> None:
    table = measure(
        "t", "pages", [Case("one", lambda: clock.work(1, 1), 1), Case("ten at once", lambda: clock.work(2, 1), 10)]
    )

    assert table.timings[1].ratio == pytest.approx(5.0)


def test_cases_take_turns_and_the_first_round_does_not_count(clock: Clock) -> None:
    order: list[str] = []

    def case(name: str) -> Case:
        def work() -> None:
            order.append(name)
            clock.work(100.0 if len(order) <= 2 else 1.0, 0.0)

        return Case(name, work, 1)

    table = measure("t", "blocks", [case("a"), case("b")], quick=True)

    assert order == ["a", "b"] * (QUICK_ROUNDS + 1)
    assert [timing.median_s for timing in table.timings] == [1.0, 1.0]


def test_slow_moment_that_hits_both_cases_leaves_the_ratio(clock: Clock) -> None:
    load: Iterator[float] = iter([factor for round_ in range(ROUNDS + 1) for factor in [1.0 + round_] * 2])

    table = measure(
        "t",
        "blocks",
        [Case("a", lambda: clock.work(next(load), 0), 1), Case("b", lambda: clock.work(4 * next(load), 0), 1)],
    )

    assert table.timings[1].ratio == pytest.approx(0.25)


def test_preparation_is_not_timed(clock: Clock) -> None:
    table = measure("t", "blocks", [Case("a", lambda: clock.work(1, 1), 1, prepare=lambda: clock.work(50, 50))])

    assert (table.timings[0].median_s, table.timings[0].cpu_s) == (1.0, 1.0)


def test_what_the_process_at_the_other_end_spends_is_told_apart() -> None:
    code = "import sys; [print(sum(range(2_000_000)), flush=True) for _ in sys.stdin]"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        order, answer = process.stdin, process.stdout
        assert order is not None
        assert answer is not None

        def work() -> None:
            order.write("go\n")
            order.flush()
            answer.readline()

        alone, together = measure(
            "t", "runs", [Case("alone", lambda: None, 1), Case("together", work, 1, partner=process.pid)], rounds=2
        ).timings
        order.close()

    assert alone.partner_cpu_s is None
    assert together.partner_cpu_s is not None
    assert together.partner_cpu_s > together.cpu_s > 0


def test_unknown_workload_and_missing_argument_are_refused() -> None:
    with pytest.raises(ConfigError, match="workload 'x' is unknown; known are hash"):
        run("x")
    with pytest.raises(ConfigError, match="workload disk needs DIR"):
        run("disk")


def test_workload_is_a_module_that_gets_argument_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []

    def note(argument: str, quick: bool) -> list[Table]:
        seen.append((argument, quick))
        return []

    monkeypatch.setitem(WORKLOADS, "mine", BenchWorkload("mine", "some.module", "DIR"))
    monkeypatch.setattr(bench, "import_module", lambda name: {"some.module": SimpleNamespace(run=note)}[name])

    assert run("mine", "/d", quick=True) == []
    assert seen == [("/d", True)]


@pytest.mark.parametrize(
    ("peer", "asked", "given"), [("a rival", True, True), ("a rival", False, False), ("", True, False)]
)
def test_a_peer_is_measured_where_there_is_one_and_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, peer: str, asked: bool, given: bool
) -> None:
    seen: list[bool] = []

    def note(argument: str, quick: bool, peer: bool = False) -> list[Table]:
        seen.append(peer)
        return []

    monkeypatch.setitem(WORKLOADS, "mine", BenchWorkload("mine", "some.module", "", peer))
    monkeypatch.setattr(bench, "import_module", lambda name: SimpleNamespace(run=note))

    run("mine", peer=asked)

    assert seen == [given]


def test_report_is_json_with_machine_and_versions() -> None:
    table = measure("t", "blocks", [Case("a", lambda: sum(range(1000)), 1)], quick=True)

    copy = json.loads(json.dumps(report({"hash": [table]})))

    assert copy["machine"]["cores"] >= 1
    assert {"python", "kvtiers", "numpy"} <= set(copy["versions"])
    assert copy["workloads"]["hash"][0]["timings"][0]["name"] == "a"
