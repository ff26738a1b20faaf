"""What holds for every test: nothing is left behind, and what is missing on a machine skips with a reason or fails.

--run-slow       also the tests marked `slow` (make test-long)
--require-redis  a missing redis-server is an error, not a skip; continuous integration says so
--require-model  the same for the converted SmolLM2
--require-browser the same for chromium, its driver and selenium
"""

from __future__ import annotations

import gc
import os
import signal
import sysconfig
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings

from kvstore.demo.models import find_smollm2
from kvstore.testing.redis_server import RedisNotInstalled, find_redis_server
from tests.helpers.browser import browser_problem

# A busy machine may take a second for an example of a millisecond; a hang is ended by pytest's own limit.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

GRACE_S = 5.0  # what ends by itself may take this long; a test that leaves nothing waits not at all
FILES = Path("/proc/self/fd")
# Libraries keep these for the rest of the process: fonts and the like, and the monitor of progress bars.
LIBRARIES = sysconfig.get_path("purelib")
LIBRARY_THREADS = {"tqdm_monitor"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow")
    parser.addoption("--require-redis", action="store_true", help="fail, rather than skip, without a redis-server")
    parser.addoption("--require-model", action="store_true", help="fail, rather than skip, without the real model")
    parser.addoption("--require-browser", action="store_true", help="fail, rather than skip, without a browser")


def pytest_configure(config: pytest.Config) -> None:
    # Where tests run in the background of a shell, Ctrl-C is ignored, and so it would be by the processes they start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A worker of pytest-xdist is told the size of the terminal, to which no test's output goes.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.pop("COLUMNS", None)
        os.environ.pop("LINES", None)
    if config.getoption("--require-redis") and _redis_problem():
        raise pytest.UsageError(f"--require-redis: {_redis_problem()}")
    if config.getoption("--require-model") and find_smollm2() is None:
        raise pytest.UsageError("--require-model: the model is not in the cache; run .ci/setup model")
    if config.getoption("--require-browser") and browser_problem():
        raise pytest.UsageError(f"--require-browser: {browser_problem()}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "slow": "" if config.getoption("--run-slow") else "takes minutes: --run-slow, or make test-long",
        "redis": _redis_problem(),
        "browser": browser_problem(),
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    """Note what a fixture of a wider scope opens: it outlives the test that happened to ask for it first."""
    if fixturedef.scope == "function":
        return (yield)
    threads, files = set(threading.enumerate()), _open_files()
    try:
        return (yield)
    finally:
        _outliving.threads |= set(threading.enumerate()) - threads
        _outliving.files |= set(_open_files().items()) - set(files.items())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Fail a test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    known = before | _outliving.threads
    left = [thread for thread in threading.enumerate() if thread not in known and thread.name not in LIBRARY_THREADS]
    until = time.monotonic() + GRACE_S
    for thread in left:
        thread.join(max(0.0, until - time.monotonic()))
    assert [thread.name for thread in left if thread.is_alive()] == []


@pytest.fixture(autouse=True)
def no_file_is_left() -> Iterator[None]:
    """Fail a test that leaves a file, pipe or socket open. Does nothing where there is no /proc."""
    before = _open_files()
    yield
    if _left(before):
        gc.collect()  # an exception kept by the test's own report may hold a frame that holds a file
    assert _left(before) == []


@dataclass
class _Outliving:
    """What fixtures of a wider scope than one test opened while they were set up."""

    threads: set[threading.Thread] = field(default_factory=set)
    files: set[tuple[str, str]] = field(default_factory=set)


_outliving = _Outliving()


def _left(before: dict[str, str]) -> list[str]:
    known = set(before.items()) | _outliving.files
    new = (target for number, target in _open_files().items() if (number, target) not in known)
    return sorted(target for target in new if not target.startswith(LIBRARIES))


def _open_files() -> dict[str, str]:
    """Number -> what it is, of every open file; a number that was reused for something else counts as new."""
    if not FILES.is_dir():
        return {}
    files = {}
    for number in os.listdir(FILES):
        with suppress(OSError):  # the one that listed the directory
            files[number] = os.readlink(FILES / number)
    return files


def _redis_problem() -> str:
    try:
        find_redis_server()
    except RedisNotInstalled as error:
        return str(error)
    return ""
