"""Wrong input at the public face: each is told at once, with field, value and remedy, and nothing stored is lost.

What single modules refuse is tested beside them; here it goes through `open_store`, the store and the command line.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvstore.build import open_store
from kvstore.cli.app import app
from kvstore.config.sections import Config
from kvstore.errors import ConfigError, LayoutMismatch, RequestError, StoreClosed
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.records import CutReason, RequestOptions
from kvstore.store import LocalStore
from radix.namespace import Namespace
from tests.helpers.stores import BLOCK, LAYOUT, PAGE_BYTES, load, namespace, open_small, prompt, save, use
from tests.helpers.waiting import WAIT_S

ROOT = Path(__file__).parents[2]
STORED = 6  # blocks of the prompt that a refused request or opening must not lose
DISK_BYTES = 128 * PAGE_BYTES  # as open_small makes it


@pytest.fixture
def store() -> Iterator[LocalStore]:
    """A store with a prompt in it, which must be there at the end too."""
    with open_small() as store:
        use(store, prompt(STORED))
        yield store
        store.check()
        assert store.stats()["leases"] == 0
        assert load(store, store.request(prompt(STORED)))[0] == STORED


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Path]:
    """A directory with a prompt in it, which the right settings must find again at the end."""
    directory = tmp_path / "pages"
    with open_small(directory) as store:
        use(store, prompt(STORED))
        assert store.flush(WAIT_S)
    yield directory
    with open_small(directory) as store:
        assert load(store, store.request(prompt(STORED)))[0] == STORED


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (None, "tokens is None"),
        (7, "tokens is an int"),
        ("a prompt", "tokens is a str"),
        (b"\1\0\0\0", "tokens is a bytes"),
        ({1: 2}, "tokens is a dict"),
        ([1, 2.5], r"tokens\[1\] is 2.5"),
        ([1, "2"], r"tokens\[1\] is '2'"),
        ([1, None], r"tokens\[1\] is None"),
        ([0, True], r"tokens\[1\] is True"),
        ([1, -2], r"tokens\[1\] is -2"),
        ([1, 1 << 32], r"tokens\[1\] is 4294967296"),
        ([[1, 2], [3, 4]], r"tokens\[0\] is a list.*pass one row"),
        (np.array([1.0, 2.0]), "tokens holds floats .dtype float64"),
        (np.array([True]), "tokens holds bools"),
        (np.array(["a"]), "tokens holds <U1"),
        (np.array([3, -1]), r"tokens\[1\] is -1"),
        (np.array([1 << 40]), r"tokens\[0\] is 1099511627776"),
        (np.zeros((2, 3), np.int64), r"tokens has shape \(2, 3\).*pass one row"),
        (np.array(5), r"tokens has shape \(\)"),
    ],
    ids=repr,
)
def test_tokens_of_the_wrong_type_shape_or_range_are_refused_with_what_is_wrong(
    store: LocalStore, tokens: Any, told: str
) -> None:
    with pytest.raises(RequestError, match=told) as refused:
        store.request(tokens)

    assert "must be" in str(refused.value) or "pass " in str(refused.value)


def test_tokens_that_extend_a_request_are_judged_alike_and_leave_it_as_it_was(store: LocalStore) -> None:
    request = store.request(prompt(2))
    keys = list(request.keys)

    for tokens in ([1, -1], np.ones((2, 2), np.int64), [0.5], "abc"):
        with pytest.raises(RequestError, match="tokens"):
            store.extend(request, tokens)

    assert (request.keys, request.num_tokens) == (keys, 2 * BLOCK + 1)
    store.extend(request, prompt(STORED)[2 * BLOCK + 1 :])
    assert store.lookup(request).num_blocks == STORED


@pytest.mark.parametrize("tokens", [[], (), np.zeros(0, np.int64)], ids=["list", "tuple", "array"])
def test_an_empty_prompt_is_refused(store: LocalStore, tokens: Any) -> None:
    with pytest.raises(RequestError, match="tokens is empty; a prompt has at least one token"):
        store.request(tokens)


@pytest.mark.parametrize("num_tokens", [1, BLOCK - 1, BLOCK])
def test_a_prompt_without_a_block_before_its_last_token_is_a_plain_miss(store: LocalStore, num_tokens: int) -> None:
    request = store.request(prompt(STORED)[:num_tokens])  # the head of what is stored

    match = store.wait_lookup(request)

    assert (match.num_blocks, match.num_tokens, match.pending, match.cut) == (0, 0, False, CutReason.TOO_SHORT)
    assert load(store, request)[0] == 0
    save(store, request)
    store.keep.finished(request)


# ---- what else a request is given ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ttl_s": 0}, "options.ttl_s is 0; it must be positive"),
        ({"ttl_s": -3.0}, "options.ttl_s is -3.0; it must be positive"),
        ({"ttl_s": float("nan")}, "options.ttl_s is nan"),
        ({"ttl_s": "1h"}, "options.ttl_s is '1h'"),
        ({"retain_until": -1.0}, "options.retain_until is -1.0; .*Unix time"),
        ({"retain_until": "tomorrow"}, "options.retain_until is 'tomorrow'"),
        ({"priority": "high"}, "options.priority is 'high'; it must be an int"),
        ({"priority": None}, "options.priority is None"),
        ({"tenant": 5}, "options.tenant is 5; it must be text"),
        ({"tenant": None}, "options.tenant is None"),
        ({"tenant": "\ud800"}, "options.tenant is .*; it must be text"),
        ({"session": 5}, "options.session is 5; it must be text"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_anything_is_done(
    store: LocalStore, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(RequestError, match=told):
        store.request(prompt(2), RequestOptions(**options))


def test_options_of_another_type_are_refused(store: LocalStore) -> None:
    with pytest.raises(RequestError, match="options is a dict; it must be RequestOptions"):
        store.request(prompt(2), {"tenant": "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, STORED + 1, 1.5, "2", None], ids=repr)
def test_block_numbers_that_the_request_does_not_have_are_refused_with_those_it_has(
    store: LocalStore, value: Any
) -> None:
    request = store.request(prompt(STORED))
    told = rf"is {re.escape(repr(value))}; .*(blocks 0 to {STORED}|an int)"

    with pytest.raises(RequestError, match=f"num_blocks {told}"):
        store.prepare_load(request, value)
    with pytest.raises(RequestError, match=f"first {told}"):
        store.prepare_save(request, value, 0)
    with pytest.raises(RequestError, match=f"num_blocks {told}"):
        store.prepare_save(request, 0, value)
    with pytest.raises(RequestError, match=f"first {told}"):
        store.keep.forget(request, value)


def test_a_save_beyond_the_prompt_is_refused(store: LocalStore) -> None:
    request = store.request(prompt(STORED))

    with pytest.raises(RequestError, match=rf"first \+ num_blocks is {STORED + 1}"):
        store.prepare_save(request, STORED - 1, 2)


def test_filled_of_another_length_is_refused_and_the_lease_goes_on(store: LocalStore) -> None:
    request = store.request(prompt(3, seed=1))
    lease = store.prepare_save(request, 0, 3)

    with pytest.raises(RequestError, match="filled has 2 entries; the lease has 3 pages"):
        store.complete(lease, filled=[True, True])

    store.complete(lease, filled=[True, False, False])
    assert store.lookup(request).num_blocks == 1


@pytest.mark.parametrize(
    ("hashes", "num_tokens", "told"),
    [
        ([b"x" * 32], 0, f"num_tokens is 0; 1 blocks of {BLOCK} tokens need at least {BLOCK}"),
        ([b"x" * 32] * 2, 2 * BLOCK - 1, f"num_tokens is {2 * BLOCK - 1}; 2 blocks"),
        ([], 0, "num_tokens is 0"),
        ([b"x" * 32], float(BLOCK), rf"num_tokens is {BLOCK}.0; it must be an int"),
        ([b"x" * 32], None, "num_tokens is None; it must be an int"),
        ([5], BLOCK, r"hashes\[0\] is int; it must be bytes"),
        (["x" * 32], BLOCK, r"hashes\[0\] is str; it must be bytes"),
        (None, BLOCK, "hashes is None"),
    ],
    ids=["none", "few", "empty", "float", "missing", "ints", "text", "nothing"],
)
def test_wrong_hashes_of_an_engine_are_refused(store: LocalStore, hashes: Any, num_tokens: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        store.request_from_hashes(hashes, num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "seconds"),
    [(0, 1.0), (-100, 1.0), (100, 0.0), (100, -1.0), (100, float("nan")), (100, float("inf")), (float("nan"), 1.0)],
)
def test_a_prefill_that_cannot_be_is_not_taken_in(tmp_path: Path, num_tokens: Any, seconds: float) -> None:
    with open_small(tmp_path) as store:
        use(store, prompt(4))
        assert store.flush(WAIT_S)
    with open_small(tmp_path) as store:
        store.observe_prefill(num_tokens, seconds)

        assert store.stats()["prefill_rate"] == 0.0
        assert load(store, store.request(prompt(4)))[0] == 4


def test_a_closed_store_says_so_and_lets_clean_up_code_run() -> None:
    store = open_small()
    request = store.request(prompt(2))
    save_lease = store.prepare_save(request, 0, 2)
    store.close()
    store.close()

    for call in (store.lookup, store.wait_lookup, store.keep.pin, store.keep.unpin, store.prefetch, store.keep.forget):
        with pytest.raises(StoreClosed):
            call(request)
    for number in (store.prepare_load, lambda of, n: store.prepare_save(of, 0, n)):
        with pytest.raises(StoreClosed):
            number(request, 1)
    store.complete(save_lease)
    store.release(save_lease)
    store.keep.finished(request)


# ---- configuration and opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("store.block_size", 0, "is 0 .*at least 1"),
        ("host.capacity_bytes", 0, "is 0 .*at least 4096 bytes"),
        ("disk.capacity_bytes", 0, "is 0 .*at least 4096 bytes"),
        ("disk.capacity_bytes", "four gigs", "is 'four gigs' .*\"512MiB\""),
        ("redis.url", "reddis://localhost:6379/0", "is 'reddis://localhost:6379/0' .*did you mean redis://"),
        ("redis.url", "localhost:6379", "is 'localhost:6379' .*no scheme; write for example redis://"),
        ("redis.url", "redis://localhost:63790000", "port '63790000'; it must be a number from 1 to 65535"),
        ("redis.url", "redis://localhost:6379/zero", "database 'zero'; it must be a number"),
        ("redis.url", "redis://localhost/0?dbb=1", "unknown option 'dbb'; did you mean db"),
    ],
)
def test_a_wrong_setting_is_told_with_field_value_and_remedy(field: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(field)} .*{told}"):
        Config.load(**{field: value})


def test_a_password_in_a_wrong_url_is_not_told() -> None:
    with pytest.raises(ConfigError, match=r"redis\.url is 'redi://:\*\*\*@host") as refused:
        Config(redis={"url": "redi://:geheim@host:6379/0"})

    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize("block_size", [0, -16])
def test_a_layout_or_namespace_of_empty_blocks_is_refused(block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"block_size is {block_size}; it must be at least 1 token"):
        dataclasses.replace(LAYOUT, block_size=block_size)
    with pytest.raises(ValueError, match=f"block_size is {block_size}; it must be at least 1 token"):
        Namespace(model="m", revision="1", dtype="uint8", layout="l", block_size=block_size)


def test_a_slab_larger_than_memory_is_refused_with_what_fits(stored: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^host\.capacity_bytes is {1 << 60} .*only \d+ bytes.*set it to at most"):
        open_small(stored, host={"capacity_bytes": 1 << 60})


def test_a_slab_smaller_than_a_page_is_refused_with_what_is_enough(stored: Path) -> None:
    with pytest.raises(ConfigError, match=r"^host\.capacity_bytes is 4 KiB, less than one page .*give at least"):
        open_small(stored, host={"capacity_bytes": 4096})


@pytest.mark.parametrize(
    ("capacity", "told"),
    [
        (1 << 55, "only .* bytes for it: set it to at most"),
        (PAGE_BYTES - 4096, f"at least one page of {PAGE_BYTES} bytes"),
        (DISK_BYTES // 2, f"already has {DISK_BYTES} bytes of slots and does not shrink: set it to at least that"),
    ],
    ids=["larger than the disk", "smaller than a page", "smaller than it is"],
)
def test_a_disk_of_a_wrong_size_is_refused_with_what_would_be_right(stored: Path, capacity: int, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^disk\.capacity_bytes is {capacity}.*{told}"):
        open_small(stored, disk={"capacity_bytes": capacity})


@pytest.mark.parametrize("where", ["a file", "below a file", "/proc/nowhere"])
def test_a_disk_path_that_cannot_be_one_is_told(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("no directory")
    path = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "pages"}.get(where, Path(where))

    with pytest.raises(ConfigError, match=rf"^disk\.path is {re.escape(str(path))}: it must be a directory"):
        open_small(path)

    assert (tmp_path / "file").read_text() == "no directory"


def test_a_refused_opening_leaves_no_thread_and_no_file_open(stored: Path) -> None:
    code = (
        "import os, sys, threading\n"
        "from pathlib import Path\n"
        "from tests.helpers.stores import *\n"
        "from kvstore.errors import ConfigError\n"
        "open_small(Path(sys.argv[1])).close()\n"
        "before = os.listdir('/proc/self/fd')\n"
        "for wrong in ({'disk': {'capacity_bytes': 1 << 55}}, {'redis': {'connections': 1, 'prefix': 'é'}}):\n"
        "    try:\n"
        "        open_small(Path(sys.argv[1]), 'redis://127.0.0.1:1', **wrong)\n"
        "    except ConfigError as error:\n"
        "        print(error)\n"
        "print(len(os.listdir('/proc/self/fd')) - len(before), threading.active_count())\n"
    )

    done = subprocess.run([sys.executable, "-c", code, str(stored)], cwd=ROOT, capture_output=True, text=True)

    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].startswith("disk.capacity_bytes is ")
    assert lines[1].startswith("redis.prefix is 'é'")
    assert lines[2] == "0 1"


# ---- another geometry on the same directory --------------------------------------------------------------------------

TWICE = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0, 1), 2 * PAGE_BYTES),), "test:bytes", "uint8")
OTHERS = {
    "larger pages": TWICE,
    "another block size": dataclasses.replace(LAYOUT, block_size=2 * BLOCK),
    "another dtype": dataclasses.replace(LAYOUT, dtype="int8"),
    "another byte order": dataclasses.replace(LAYOUT, format="test:other"),
}


def open_with(directory: Path, layout: Layout) -> LocalStore:
    config = Config(
        host={"capacity_bytes": 8 * layout.slot_bytes, "huge_pages": False},
        disk={"path": directory, "capacity_bytes": 128 * layout.slot_bytes},
    )
    return open_store(config, layout, namespace(layout))


def mismatch(directory: Path, layout: Layout) -> str:
    """What the refusal must say: the field, both geometries, the remedy."""
    ours, theirs = LAYOUT.fingerprint, layout.fingerprint
    return rf"^disk\.path is {re.escape(str(directory))}: .*{ours}.*{theirs}.*a directory of its own"


@pytest.mark.parametrize("layout", OTHERS.values(), ids=OTHERS.keys())
def test_pages_of_another_geometry_are_refused_and_kept(stored: Path, layout: Layout) -> None:
    with pytest.raises(LayoutMismatch, match=mismatch(stored, layout)):
        open_with(stored, layout)


def test_another_geometry_is_refused_beside_a_store_in_use(stored: Path) -> None:
    with open_small(stored) as store:
        with pytest.raises(LayoutMismatch, match=mismatch(stored, TWICE)):
            open_with(stored, TWICE)

        assert use(store, prompt(STORED)) == STORED


def test_a_second_process_of_another_geometry_is_refused_and_the_first_goes_on(stored: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kvstore.errors import LayoutMismatch\n"
        "from tests.kvstore.test_bad_input import TWICE, open_with\n"
        "try:\n"
        "    open_with(Path(sys.argv[1]), TWICE)\n"
        "except LayoutMismatch as error:\n"
        "    print(error)\n"
    )
    with open_small(stored) as store:
        done = subprocess.run([sys.executable, "-c", code, str(stored)], cwd=ROOT, capture_output=True, text=True)

        assert re.match(mismatch(stored, TWICE), done.stdout), done.stderr
        assert use(store, prompt(STORED)) == STORED
        assert use(store, prompt(STORED, seed=1)) == 0
        assert store.flush(WAIT_S)


def test_a_namespace_that_does_not_fit_the_layout_names_the_field() -> None:
    config = Config(host={"capacity_bytes": 8 * PAGE_BYTES, "huge_pages": False})

    with pytest.raises(ConfigError, match=rf"^namespace\.block_size is {2 * BLOCK}; .*{BLOCK}"):
        open_store(config, LAYOUT, namespace(OTHERS["another block size"]))
    with pytest.raises(ConfigError, match=r"^namespace\.hash is 'xxh3_128'; .*'sha256'"):
        open_store(config, LAYOUT, namespace(hash="xxh3_128"))


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_command_on_what_is_no_directory_of_pages_says_so_in_a_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("")
    told = {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "file": "is not a directory",
        tmp_path: "is not the directory of a disk tier",
    }

    for path, reason in told.items():
        result = CliRunner().invoke(app, [command, str(path)])
        output = " ".join(result.output.split())
        assert result.exit_code == 2
        assert reason in output
        assert "Traceback" not in output


def test_the_command_config_tells_what_is_wrong_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kvstore.toml").write_text('[store]\nblock_size = 0\n[redis]\nurl = "redi://h"\n')

    result = CliRunner().invoke(app, ["config"])

    output = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "store.block_size is 0" in output
    assert "redis.url is 'redi://h'" in output
