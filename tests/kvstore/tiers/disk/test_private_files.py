"""A disk directory whose files are somebody else's is refused, untouched, with what to run."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.testing.pages import fetch, keys_of, payload, store
from kvstore.tiers.disk.report import describe
from tests.helpers.disk import SLOT_BYTES, open_disk

KEYS = keys_of("page", 3)
OTHER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A directory with KEYS in it."""
    with closing(open_disk(tmp_path / "cache")) as tier:
        assert all(store(tier, KEYS, SLOT_BYTES))
    return tmp_path / "cache"


def check_all_there(pages: Path) -> None:
    with closing(open_disk(pages)) as tier:
        assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]


FILES = ["lock", "pages.slab", "index/data.mdb"]


@pytest.mark.parametrize("name", [*FILES, "index"])
def test_a_link_in_the_place_of_a_file_is_refused_and_what_it_names_stays(pages: Path, name: str) -> None:
    elsewhere = pages.parent / "elsewhere"
    (pages / name).rename(elsewhere)
    (pages / name).symlink_to(elsewhere)
    before = elsewhere.read_bytes() if elsewhere.is_file() else sorted(elsewhere.iterdir())

    with pytest.raises(ConfigError, match=rf"disk\.path: {pages / name} is a link, .* nothing was changed\. Run: "):
        open_disk(pages)

    assert before == (elsewhere.read_bytes() if elsewhere.is_file() else sorted(elsewhere.iterdir()))
    (pages / name).unlink()
    elsewhere.rename(pages / name)
    check_all_there(pages)


@pytest.mark.parametrize("mode", [0o644, 0o666, 0o606])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_others_can_read_or_change_is_refused(pages: Path, name: str, mode: int) -> None:
    (pages / name).chmod(mode)

    with pytest.raises(ConfigError, match=rf"{name} can be .* by every user \(mode 0{mode:o}\).*Run: chmod 600 "):
        open_disk(pages)

    (pages / name).chmod(0o600)
    check_all_there(pages)


@needs_root
@pytest.mark.parametrize("name", [*FILES, "index", "."])
def test_what_belongs_to_another_user_is_refused(pages: Path, name: str) -> None:
    os.chown(pages / name, OTHER, OTHER)

    with pytest.raises(ConfigError, match=rf"belongs to user {OTHER}, and this process runs as .*Run: chown -R 0 "):
        open_disk(pages)

    os.chown(pages / name, 0, 0)
    check_all_there(pages)


@needs_root
def test_root_may_look_at_what_another_user_stores(pages: Path) -> None:
    for path in [pages, *pages.rglob("*")]:
        os.chown(path, OTHER, OTHER)

    assert describe(pages)["pages"] == 3


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o707])
def test_a_directory_in_which_everybody_can_put_files_is_refused_and_one_below_it_taken(
    tmp_path: Path, mode: int
) -> None:
    shared = tmp_path / "volume"
    shared.mkdir()
    shared.chmod(mode)

    with pytest.raises(ConfigError, match=r"can be changed by every user .*or set disk\.path to a directory below it"):
        open_disk(shared)

    assert list(shared.iterdir()) == []
    open_disk(shared / "cache").close()


def test_what_kubernetes_makes_of_a_volume_with_an_fsgroup_is_taken(pages: Path) -> None:
    for path in [pages, *pages.rglob("*")]:  # the group's bits, at each start of the pod
        path.chmod(0o2770 if path.is_dir() else 0o660)

    check_all_there(pages)


def test_a_link_of_our_own_may_lead_to_the_directory(pages: Path) -> None:
    (pages.parent / "link").symlink_to(pages)

    check_all_there(pages.parent / "link")


@needs_root
def test_a_link_of_another_user_is_not_followed(pages: Path) -> None:
    link = pages.parent / "link"
    link.symlink_to(pages)
    os.chown(link, OTHER, OTHER, follow_symlinks=False)

    with pytest.raises(ConfigError, match=f"belongs to user {OTHER}"):
        open_disk(link)


def test_a_file_with_a_second_name_is_not_written_to(pages: Path) -> None:
    os.link(pages / "pages.slab", pages.parent / "backup")

    with pytest.raises(ConfigError, match="has 2 names"):
        open_disk(pages)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["a directory", "a pipe"])
@pytest.mark.parametrize("name", ["lock", "pages.slab"])
def test_what_is_no_file_is_refused_and_nothing_waits_for_it(
    pages: Path, name: str, make: Callable[[Path], None]
) -> None:
    (pages / name).unlink()
    make(pages / name)

    with pytest.raises(ConfigError, match="and must be a file"):
        open_disk(pages)


def test_a_file_in_the_place_of_the_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("")

    with pytest.raises(ConfigError, match="is a file, and must be a directory"):
        open_disk(tmp_path)


def test_a_link_in_the_place_of_the_index_that_was_set_aside_is_removed(pages: Path) -> None:
    (pages.parent / "elsewhere").mkdir()
    (pages / "index.damaged").symlink_to(pages.parent / "elsewhere")
    (pages / "index/data.mdb").write_bytes(b"garbage" * 10_000)

    open_disk(pages).close()

    assert not (pages / "index.damaged").is_symlink()
    assert list((pages.parent / "elsewhere").iterdir()) == []
