"""The tenants' file: whose it may be, and that no two tenants can meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.service.daemon.tenants import Tokens, read_tokens

TOKENS = {"blue": "0123456789abcdef-blue", "green": "0123456789abcdef-green"}


def read(path: Path, *tenants: str, mode: int = 0o600) -> Tokens:
    """Read a file with these tenants: "name" or "name=salt"."""
    text = ""
    for tenant in tenants:
        name, has_salt, salt = tenant.partition("=")
        text += f'[[tenant]]\nname = "{name}"\ntoken = "{TOKENS[name]}"\n' + f'salt = "{salt}"\n' * bool(has_salt)
    (path / "tokens.toml").write_text(text)
    (path / "tokens.toml").chmod(mode)
    return read_tokens(path / "tokens.toml")


def test_each_tenant_is_found_by_its_token_and_salted_by_its_name(tmp_path: Path) -> None:
    tokens = read(tmp_path, "blue", "green=other")

    found = tokens.find(TOKENS["blue"])
    assert found is not None
    assert (found.name, found.salt) == ("blue", "blue")
    assert [tenant.salt for tenant in tokens.tenants] == ["blue", "other"]


@pytest.mark.parametrize(
    "tenants",
    [("blue=same", "green=same"), ("blue=green", "green"), ("blue", "green=blue"), ("blue=green", "green=x")],
    ids=["equal salts", "salt of the first", "salt of the second", "the other has a salt, too"],
)
def test_tenants_that_would_meet_in_redis_are_refused(tmp_path: Path, tenants: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="would share a salt"):
        read(tmp_path, *tenants)


def test_a_salt_that_is_the_tenants_own_name_is_taken(tmp_path: Path) -> None:
    assert len(read(tmp_path, "blue=blue", "green").tenants) == 2


def test_a_file_from_a_kubernetes_secret_is_taken_and_one_for_everybody_is_not(tmp_path: Path) -> None:
    assert len(read(tmp_path, "blue", mode=0o440).tenants) == 1
    with pytest.raises(ConfigError, match="can be read by every user"):
        read(tmp_path, "blue", mode=0o444)


SECRET = "S3cr3t-token-of-32-characters-0123"


@pytest.mark.parametrize(
    "entry",
    [
        f'name = "{SECRET}"\ntoken = "blue"',
        f'name = "{SECRET.lower()}"\ntoken = "{SECRET.lower()}"',
        f'{SECRET} = "blue"\nname = "blue"\ntoken = "{SECRET}"',
        f'name = "blue"\ntoken = "{SECRET}"\nhost_bytes = "{SECRET}"',
        f'name = "blue"\ntoken = "{SECRET}"\nsalt = ["{SECRET}"]',
    ],
    ids=["name", "both", "field", "size", "kind"],
)
def test_a_token_in_the_wrong_place_is_not_shown(tmp_path: Path, entry: str) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(f"[[tenant]]\n{entry}\n")
    file.chmod(0o600)

    with pytest.raises(ConfigError) as refused:
        read_tokens(file)

    assert SECRET.lower() not in str(refused.value).lower()


def test_what_is_too_short_for_a_token_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(f'[[tenant]]\nname = "Blue"\ntoken = "{SECRET}"\n')
    file.chmod(0o600)

    with pytest.raises(ConfigError, match="name is 'Blue'"):
        read_tokens(file)
