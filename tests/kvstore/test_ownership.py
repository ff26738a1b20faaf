"""Files with tokens and keys are taken as their owners and Kubernetes leave them, and refused where others can read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.ownership import check_secret, exposure, read_secret, user_name

OTHER = 12345  # a user and a group that are not ours
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_a_file_that_only_we_or_our_group_can_read_is_taken(key: Path, mode: int) -> None:
    key.chmod(mode)

    assert read_secret("service.tls_key", key) == b"secret"


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o444, 0o666, 0o660])
def test_a_file_that_others_can_read_or_change_is_refused_with_what_to_run(key: Path, mode: int) -> None:
    key.chmod(mode)

    with pytest.raises(ConfigError, match=rf"service\.tls_key is {key}; it can be .*mode 0{mode:o}\); run: chmod 600"):
        check_secret("service.tls_key", key)


@needs_root
def test_a_file_that_another_group_can_read_is_refused(key: Path) -> None:
    key.chmod(0o440)
    os.chown(key, 0, OTHER)

    with pytest.raises(ConfigError, match=f"by group {OTHER}"):
        check_secret("service.tls_key", key)


@needs_root
def test_a_file_of_another_user_is_refused(key: Path) -> None:
    os.chown(key, OTHER, 0)

    with pytest.raises(ConfigError, match=rf"belongs to user {OTHER}, and this process runs as user .*; run: chown 0 "):
        read_secret("service.tls_key", key)


def test_a_link_is_followed_as_kubernetes_makes_them(key: Path, tmp_path: Path) -> None:
    (tmp_path / "..data").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to("..data/key")

    assert read_secret("service.tokens_file", tmp_path / "link") == b"secret"
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        read_secret("service.tokens_file", tmp_path / "link")


def test_what_is_no_file_is_refused_and_nothing_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)

    with pytest.raises(ConfigError, match="must be a file, and is a pipe"):
        read_secret("service.tokens_file", tmp_path / "pipe")
    with pytest.raises(ConfigError, match="must be a file, and is a directory"):
        read_secret("service.tokens_file", tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_secret("service.tokens_file", tmp_path / "nothing")


def test_a_user_without_a_name_has_a_number() -> None:
    assert user_name(4_000_000) == "user 4000000"


def test_permissions_that_nobody_asked_about_do_not_count(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)

    assert exposure(tmp_path.stat(), 0o222) is None
