"""Paths in settings mean what their writers mean, from whichever source they come, or are refused with the reason."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from kvstore.config.reference import effective
from kvstore.config.sections import Config
from kvstore.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working directory of our own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CACHE", "/fast")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


MEANT = {
    "/var/kv": "/var/kv",
    "/var/kv/": "/var/kv",
    " /var/kv\n": "/var/kv",
    "/var/kv\r": "/var/kv",
    "~/kv": "{home}/home/kv",
    "~": "{home}/home",
    "~root/kv": "/root/kv",
    "$CACHE/kv": "/fast/kv",
    "${CACHE}/kv": "/fast/kv",
    "/with space/kv": "/with space/kv",
    "/with$/kv": "/with$/kv",
    "/ünïcode": "/ünïcode",
}
RELATIVE = {"kv": "kv", "./kv": "kv", "a/b": "a/b"}
REFUSED = {
    '"/var/kv"': "quotes",
    "'/var/kv'": "quotes",
    "file:///var/kv": "not a URL: write /var/kv",
    "unix:///run/x": "not a URL: write /run/x",
    "C:\\kv": "Windows",
    "c:/kv": "Windows",
    "\\\\server\\kv": "Windows",
    "$NOT_SET/kv": r"\$NOT_SET is not set",
    "${NOT_SET}/kv": r"\$\{NOT_SET\} is not set",
    "$(CACHE)/kv": "Kubernetes",
    "~nobody-has-this-name/kv": "home of nobody",
    "/var/k\nv": "control character",
    "/var/k\tv": "control character",
    "/" + "x" * 300: "too long",
    "/x" * 3000: "too long",
}


@pytest.mark.parametrize("written", MEANT)
def test_a_path_in_the_environment_means_what_its_writer_means(
    home: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("KVSTORE_DISK__PATH", written)

    assert str(Config.load().disk.path) == MEANT[written].format(home=home)


@pytest.mark.parametrize("written", REFUSED)
def test_a_path_that_must_be_a_mistake_is_refused_with_its_source(
    monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("KVSTORE_DISK__PATH", written)

    with pytest.raises(ConfigError, match=REFUSED[written]) as caught:
        Config.load()

    assert "disk.path is " in str(caught.value)
    assert "(from environment KVSTORE_DISK__PATH)" in str(caught.value)


@pytest.mark.parametrize("written", [*MEANT, *REFUSED])
def test_a_file_and_a_keyword_mean_the_same_as_the_environment(home: Path, written: str) -> None:
    literal = written.encode("unicode_escape").decode().replace('"', '\\"').replace("\\xfc", "ü").replace("\\xef", "ï")
    (home / "f.toml").write_text(f'[disk]\npath = "{literal}"\n')

    for load in (lambda: Config.load(home / "f.toml"), lambda: Config(disk={"path": written})):
        if written in REFUSED:
            with pytest.raises(ConfigError, match=REFUSED[written]):
                load()
        else:
            assert str(load().disk.path) == MEANT[written].format(home=home)


@pytest.mark.parametrize("written", RELATIVE)
def test_a_relative_path_lies_below_the_working_directory_and_in_a_file_below_the_files(
    home: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    (home / "etc").mkdir()
    (home / "etc/f.toml").write_text(f'[disk]\npath = "{written}"\n')
    monkeypatch.setenv("KVSTORE_SERVICE__TOKENS_FILE", written)

    config = Config.load("../etc/f.toml", **{"service.socket": written})

    assert config.disk.path == home / "work/../etc" / RELATIVE[written]
    assert config.service.tokens_file == config.service.socket == home / "work" / RELATIVE[written]


def test_what_is_shown_is_absolute_and_can_be_printed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environb, b"KVSTORE_DISK__PATH", b"k\xffv")

    rows = {row.field: row for row in effective(Config.load())}

    assert rows["disk.path"].text == rows["disk.path"].json_value == f"{home}/work/k?v"


def test_a_relative_path_without_a_working_directory_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "gone").mkdir()
    monkeypatch.chdir(home / "gone")
    (home / "gone").rmdir()

    with pytest.raises(ConfigError, match="the working directory is gone"):
        Config(disk={"path": "kv"})
    assert Config(disk={"path": "/kv"}).disk.path == Path("/kv")


def test_a_home_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))

    with pytest.raises(ConfigError, match="~ is the home of nobody here"):
        Config(disk={"path": "~/kv"})


def test_the_configuration_file_itself_may_be_written_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "home").mkdir()
    (home / "home/f.toml").write_text("[store]\nblock_size = 16\n")
    monkeypatch.setenv("KVSTORE_CONFIG", "~/f.toml\n")

    assert Config.load().store.block_size == 16
    with pytest.raises(ConfigError, match=r"the path given.*Windows"):
        Config.load("C:\\f.toml")


class TestSockets:
    def test_a_path_that_no_socket_can_have_is_refused_with_both_numbers(self) -> None:
        fits, too_long = "/run/" + "x" * 102, "/run/" + "x" * 103

        assert str(Config(service={"socket": fits}).service.socket) == fits
        for field, value in (("socket", too_long), ("url", f"unix://{too_long}")):
            with pytest.raises(ConfigError, match="it has 108 bytes; a unix socket's path has at most 107"):
                Config(service={field: value})

    def test_a_relative_path_counts_with_all_that_stands_before_it(self, home: Path) -> None:
        with pytest.raises(ConfigError, match="at most 107"):
            Config(service={"socket": "x" * 107})

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("unix:///run/kv.sock", "unix:///run/kv.sock"),
            ("unix:/run/kv.sock", "unix:///run/kv.sock"),
            ("unix://$CACHE/kv.sock", "unix:///fast/kv.sock"),
            ("unix:///run/kv.sock\n", "unix:///run/kv.sock"),
        ],
    )
    def test_the_daemons_url_means_what_its_writer_means(self, written: str, meant: str) -> None:
        assert Config(service={"url": written}).service.url == meant

    @pytest.mark.parametrize(
        ("written", "reason"),
        [
            ("/run/kv.sock", "write unix:///run/kv.sock"),
            ("~/kv.sock", "write unix:///path/of/socket"),
            ("unix://run/kv.sock", "absolute path"),
            ("unix:kv.sock", "absolute path"),
            ("unix:///run/kv.sock?x=1", "without"),
            ("unix:///run/my%20kv.sock", "without"),
            ("unix://$NOT_SET/kv.sock", "is not set"),
            ('"unix:///run/kv.sock"', "it must be unix:///path/of/socket"),
            ("tcp://node:8470", "it must be unix:///path/of/socket"),
            ("http://node:8470 ", "machines share by Redis: write unix:///path/of/socket"),
            ("https://node:8470", "give the daemons of all machines the same redis.url"),
            ("http://user:hunter2@node", r"kv|\*\*\*|machines share by Redis"),
        ],
    )
    def test_a_daemons_url_that_must_be_a_mistake_is_refused(self, written: str, reason: str) -> None:
        with pytest.raises(ConfigError, match=reason):
            Config(service={"url": written})


@pytest.mark.parametrize(
    "text", ['[service]\ntoken = "0123456789abcdef"\n', '[redis]\nurl = "redis://:secret@host:6379/0"\n']
)
def test_a_file_with_a_password_that_others_can_read_is_warned_of(
    home: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (home / "f.toml").write_text(text)
    (home / "f.toml").chmod(0o644)

    with caplog.at_level(logging.WARNING):
        Config.load(home / "f.toml")
    assert "can be read by every user (mode 0644); run: chmod 600" in caplog.text
    assert "secret" not in caplog.text

    caplog.clear()
    (home / "f.toml").chmod(0o600)
    Config.load(home / "f.toml")
    assert caplog.text == ""
