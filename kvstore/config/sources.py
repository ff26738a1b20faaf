"""Where configuration values come from, and how a wrong one is told.

Three readers (file, environment, keywords) each yield `Setting`s under full names such as "host.capacity_bytes", with
the place they came from; `Config.load` lays them over each other. Problems are told all at once, so that a file with
three mistakes is mended in one go.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, TomlConfigSettingsSource

from kvstore.config import paths
from kvstore.config.secret import mask_url
from kvstore.errors import ConfigError
from kvstore.ownership import exposure

DEFAULT_FILE = Path("kvstore.toml")
FILE_VARIABLE = "KVSTORE_CONFIG"
# Variables with our prefix that are no fields: the file to read, where the redis-server for tests and demo is, and the
# key of `kvstore load`.
OTHER_VARIABLES = frozenset({FILE_VARIABLE, "KVSTORE_REDIS_SERVER", "KVSTORE_LOAD_API_KEY"})
PREFIX = "KVSTORE_"
DELIMITER = "__"
KEYWORD = "keyword argument"

# Kubernetes gives every pod KVSTORE_PORT, KVSTORE_REDIS_SERVICE_HOST and the like for services called kvstore or
# kvstore-redis. They are not ours to judge, and no field of ours ends like that.
_SERVICE_LINK = re.compile(
    r"KVSTORE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
_OUR_WORDS = {
    "Value error, ": "",
    "Input should be a valid boolean, unable to interpret input": "it must be true or false",
    "Input should be a valid boolean": "it must be true or false",
    "Input should be": "it must be",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "more than",
}
_SECRETS = frozenset({"redis", "redis.url"})  # also the section: somebody may give the URL in its place
_NEVER_SHOWN = frozenset({"service", "service.token"})
_URL_WITH_SECRET = re.compile(r"(\w[\w+.-]*:/{1,2})[^\s'\"]*@")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Setting:
    """One value as its source has it, and the source in words."""

    value: Any
    origin: str


def known_fields(settings: type[BaseModel]) -> dict[str, list[str]]:
    """Section name -> field names, in the order of the models."""
    return {
        section: list(info.annotation.model_fields)
        for section, info in settings.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    }


def path_fields(settings: type[BaseModel]) -> set[str]:
    """The full names of fields whose value is a path."""
    return {
        f"{section}.{name}"
        for section, info in settings.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        for name, field in info.annotation.model_fields.items()
        if field.annotation == (Path | None)
    }


def variable(field: str) -> str:
    """The environment variable of a field: "host.ttl_s" -> "KVSTORE_HOST__TTL_S"."""
    return (PREFIX + field.replace(".", DELIMITER)).upper()


def read_file(settings: type[BaseSettings], path: str | os.PathLike[str] | None) -> dict[str, Setting]:
    """Settings of a TOML file: `path`, else $KVSTORE_CONFIG, else ./kvstore.toml where there is one.

    A file that was asked for must exist. Raises ConfigError for one that cannot be read or is not TOML.
    """
    named = os.environ.get(FILE_VARIABLE)
    if path is not None:
        file, asked_by = _file(path, "the path given"), "the path given"
    elif named:
        file, asked_by = _file(named, f"environment {FILE_VARIABLE}"), f"environment {FILE_VARIABLE}"
    elif DEFAULT_FILE.is_file():
        file, asked_by = DEFAULT_FILE, "found in the working directory"
    else:
        return {}
    if not file.is_file():
        what = "is not a file" if file.exists() else "does not exist"
        raise ConfigError(f"configuration file {file} ({asked_by}) {what}; give the path of a TOML file")
    try:
        data = TomlConfigSettingsSource(settings, toml_file=file).toml_data
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"configuration file {file} ({asked_by}) cannot be read: {reason}") from None
    except ValueError as error:  # TOMLDecodeError, which names line and column; UnicodeDecodeError
        raise ConfigError(f"configuration file {file} ({asked_by}) is not valid TOML: {error}") from None
    values = _flatten(settings, data, lambda _: str(file))
    _warn_of_readers(file, values)
    folder = Path(os.getcwd()) / file.parent
    for name in path_fields(settings) & set(values):
        values[name] = Setting(paths.below(folder, values[name].value), values[name].origin)
    return values


def _file(path: str | os.PathLike[str], asked_by: str) -> Path:
    try:
        return Path(paths.expanded(os.fspath(path)))
    except ValueError as error:
        raise ConfigError(f"configuration file {os.fspath(path)!r} ({asked_by}): {error}") from None


def _warn_of_readers(file: Path, values: Mapping[str, Setting]) -> None:
    """Say that others can read a password; a file without one is everybody's to read."""
    url = str(values["redis.url"].value) if "redis.url" in values else ""
    named = ["service.token"] if "service.token" in values else []
    named += ["redis.url with a password"] if mask_url(url) != url else []
    exposed = exposure(file.stat(), 0o444) if named else None
    if exposed:
        _log.warning(
            "configuration file %s holds %s and %s; run: chmod 600 %s", file, " and ".join(named), exposed, file
        )


def read_environment(settings: type[BaseSettings]) -> dict[str, Setting]:
    """Settings of the variables KVSTORE_<SECTION>__<FIELD>.

    Any other variable with our prefix is a mistake somebody would search for long, so it is an error too.
    """
    sections = known_fields(settings)
    expected = {
        variable(f"{section}.{field}"): f"{section}.{field}" for section, fields in sections.items() for field in fields
    }
    names: dict[str, str] = {}
    problems = []
    for name in os.environ:
        upper = name.upper()
        if upper in expected:
            names[expected[upper]] = name
        elif upper.startswith(PREFIX) and upper not in OTHER_VARIABLES and not _SERVICE_LINK.fullmatch(upper):
            problems.append(f"environment variable {name} is unknown{_did_you_mean(upper, list(expected))}")
    _raise_if_any(problems)
    data = EnvSettingsSource(settings, env_prefix=PREFIX, env_nested_delimiter=DELIMITER)()
    return _flatten(settings, data, lambda name: f"environment {names.get(name, name)}")


def read_keywords(settings: type[BaseSettings], overrides: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings of `host={"capacity_bytes": ...}`, of a section object, or of "host.capacity_bytes" itself."""
    data: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, BaseModel):
            # Only what was set on purpose: the defaults of a section object must not hide the file's values.
            value = {name: getattr(value, name) for name in value.model_fields_set}
        section, _, field = key.partition(".")
        if field:
            data.setdefault(section, {})[field] = value
        elif isinstance(value, Mapping) and isinstance(data.get(section, {}), dict):
            data.setdefault(section, {}).update(value)
        else:
            data[section] = value
    return _flatten(settings, data, lambda _: KEYWORD)


def read_all(*readers: Callable[[], dict[str, Setting]]) -> dict[str, Setting]:
    """Lay the readers' settings over each other, the last one on top. Raises one ConfigError for all their problems."""
    problems: list[str] = []

    def attempt(reader: Callable[[], dict[str, Setting]]) -> dict[str, Setting]:
        try:
            return reader()
        except ConfigError as error:
            problems.append(str(error))
            return {}

    values = {name: setting for reader in readers for name, setting in attempt(reader).items()}
    _raise_if_any(problems)
    return values


def nest(values: Mapping[str, Setting]) -> dict[str, dict[str, Any]]:
    """Turn {"host.ttl_s": ...} into {"host": {"ttl_s": ...}}."""
    nested: dict[str, dict[str, Any]] = {}
    for name, setting in values.items():
        section, _, field = name.partition(".")
        nested.setdefault(section, {})[field] = setting.value
    return nested


def explain(settings: type[BaseModel], error: ValidationError, given: Mapping[str, Setting] | None) -> ConfigError:
    """Say in our words what a validation found: field, value, source, and what would be right.

    given: what was read, by full name; None where all values are keyword arguments.
    """
    problems = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"][:2])
        setting = (given or {}).get(name, Setting(item["input"], KEYWORD if given is None else "default"))
        if item["type"] == "extra_forbidden":
            problems.append(_unknown(name, setting.origin, known_fields(settings)))
        else:
            value = f"{name} is {_shown(name, setting.value)} (from {setting.origin})"
            problems.append(f"{value}; {_what_is_right(name, item['msg'])}")
    return ConfigError("\n".join(problems))


def _flatten(settings: type[BaseSettings], data: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Setting]:
    sections = known_fields(settings)
    flat: dict[str, Setting] = {}
    problems = []
    for section, values in data.items():
        if section not in sections:
            problems.append(_unknown(section, origin(section), sections))
        elif not isinstance(values, Mapping):
            value = f"{section} is {_shown(section, values)} (from {origin(section)})"
            problems.append(f"{value}; it is a section with fields such as {section}.{sections[section][0]}")
        else:
            for field, value in values.items():
                name = f"{section}.{field}"
                if field in sections[section]:
                    flat[name] = Setting(value, origin(name))
                else:
                    problems.append(_unknown(name, origin(name), sections))
    _raise_if_any(problems)
    return flat


def _unknown(name: str, origin: str, sections: Mapping[str, Sequence[str]]) -> str:
    names = [f"{section}.{field}" for section, fields in sections.items() for field in fields]
    section, _, field = name.partition(".")
    same_field = [full for full in names if full.endswith("." + (field or section))]
    if same_field:
        hint = f"; did you mean {' or '.join(same_field)}?"
    elif section in sections:
        hint = _did_you_mean(name, [f"{section}.{known}" for known in sections[section]])
    else:
        hint = _did_you_mean(name, names if field else list(sections))
    return f"{name} (from {origin}) is unknown{hint}"


def _did_you_mean(wrong: str, right: Sequence[str]) -> str:
    close = difflib.get_close_matches(wrong, right, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(right)}"


def _shown(name: str, value: Any) -> str:
    if name in _NEVER_SHOWN:
        return "***"
    if name in _SECRETS:
        return repr(mask_url(str(value)))
    return _URL_WITH_SECRET.sub(r"\1***@", repr(value))  # a password may stand in any URL


def _what_is_right(name: str, message: str) -> str:
    # The library's sentence, made the end of ours.
    for theirs, ours in _OUR_WORDS.items():
        message = message.replace(theirs, ours)
    unit = " bytes" if name.endswith("_bytes") else " s" if name.endswith("_s") else ""
    return message + unit if message[-1:].isdigit() else message


def _raise_if_any(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))
