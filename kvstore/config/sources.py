"""Sources of configuration values, and the errors for wrong ones.

Three readers (file, environment, keywords) each yield `Setting`s under full names such as "host.capacity_bytes", with
the place they came from; `Config.load` lays them over each other. Problems are told all at once, so that a file with
three mistakes is mended in one go.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from kvstore.config import paths
from kvstore.config.secret import SecretUrl, mask_url
from kvstore.errors import ConfigError
from kvstore.ownership import exposure
from kvstore.tiers import registry

_toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

DEFAULT_FILE = Path("kvstore.toml")
FILE_VARIABLE = "KVSTORE_CONFIG"
# Variables with our prefix that are no fields: the file to read, where the redis-server for tests and demo is, and the
# key of `kvstore load`.
OTHER_VARIABLES = frozenset({FILE_VARIABLE, "KVSTORE_REDIS_SERVER", "KVSTORE_LOAD_API_KEY"})
PREFIX = "KVSTORE_"
DELIMITER = "__"
KEYWORD = "keyword argument"
HOST = "host"  # sections of tiers come after it

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
_REMOVED = {
    "service.staging_bytes": "it belonged to clients of a daemon on another machine, which are no more (machines share "
    "by Redis: redis.url); leave it out",
}
_URL_WITH_SECRET = re.compile(r"(\w[\w+.-]*:/{1,2})[^\s'\"]*@")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Setting:
    """One value as its source has it, and the source in words."""

    value: Any
    origin: str


def section_model(settings: type[BaseModel], section: str) -> type[BaseModel] | None:
    """Return the model of a section; None if there is no such section. Imports the kind of a tier.

    Raises ConfigError for a tier whose package is broken.
    """
    if section in settings.model_fields:
        return _static(settings, section)
    kind = registry.find(section)
    return None if kind is None else kind.section


def _static(settings: type[BaseModel], section: str) -> type[BaseModel]:
    model = settings.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model


def sections(settings: type[BaseModel]) -> list[str]:
    """Return the names of all sections, those of tiers after host memory. Imports nothing."""
    found = list(settings.model_fields)
    after = found.index(HOST) + 1
    return [*found[:after], *registry.names(), *found[after:]]


def known_fields(settings: type[BaseModel]) -> dict[str, list[str]]:
    """Section name -> field names, in the order of the models. Imports every kind of tier; a broken one is left out."""
    kinds = registry.kinds()
    models: dict[str, type[BaseModel] | None] = {
        name: kinds[name].section if name in kinds else None for name in registry.names()
    }
    models |= {name: _static(settings, name) for name in settings.model_fields}
    return {name: list(model.model_fields) for name in sections(settings) if (model := models[name]) is not None}


def _field(settings: type[BaseModel], name: str) -> FieldInfo | None:
    section, _, field = name.partition(".")
    model = section_model(settings, section)
    return None if model is None else model.model_fields.get(field)


def is_path(settings: type[BaseModel], name: str) -> bool:
    """True if the value of a field, by its full name, is a path."""
    info = _field(settings, name)
    return info is not None and info.annotation == (Path | None)


def secrecy(settings: type[BaseModel], name: str) -> type | None:
    """Return SecretUrl or SecretStr if a field, or one of a section's fields, is such a one."""
    section, _, field = name.partition(".")
    try:
        model = section_model(settings, section)
    except ConfigError:
        return SecretStr  # of a package that cannot be asked
    if model is None:
        return None
    infos = [model.model_fields[field]] if field in model.model_fields else [] if field else model.model_fields.values()
    kinds = {kind for info in infos for kind in (info.annotation, *get_args(info.annotation))}
    # Of a section given as one text: the URL may stand in its place, and is recognised when it is masked.
    return next((kind for kind in (SecretUrl, SecretStr) if kind in kinds), None)


def variable(field: str) -> str:
    """The environment variable of a field: "host.ttl_s" -> "KVSTORE_HOST__TTL_S"."""
    return (PREFIX + field.replace(".", DELIMITER)).upper()


def read_file(settings: type[BaseModel], path: str | os.PathLike[str] | None) -> dict[str, Setting]:
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
        data = _toml.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"configuration file {file} ({asked_by}) cannot be read: {reason}") from None
    except ValueError as error:  # TOMLDecodeError, which names line and column; UnicodeDecodeError
        raise ConfigError(f"configuration file {file} ({asked_by}) is not valid TOML: {error}") from None
    values = _flatten(settings, data, lambda _: str(file))
    _warn_of_readers(settings, file, values)
    folder = Path(os.getcwd()) / file.parent
    for name in [name for name in values if is_path(settings, name)]:
        values[name] = Setting(paths.below(folder, values[name].value), values[name].origin)
    return values


def _file(path: str | os.PathLike[str], asked_by: str) -> Path:
    try:
        return Path(paths.expanded(os.fspath(path)))
    except ValueError as error:
        raise ConfigError(f"configuration file {os.fspath(path)!r} ({asked_by}): {error}") from None


def _warn_of_readers(settings: type[BaseModel], file: Path, values: Mapping[str, Setting]) -> None:
    """Say that others can read a password; a file without one is everybody's to read."""
    named = []
    for name, setting in values.items():
        kind, text = secrecy(settings, name), str(setting.value)
        if kind is SecretStr:
            named.append(name)
        elif kind is SecretUrl and mask_url(text) != text:
            named.append(f"{name} with a password")
    exposed = exposure(file.stat(), 0o444) if named else None
    if exposed:
        _log.warning(
            "configuration file %s holds %s and %s; run: chmod 600 %s", file, " and ".join(named), exposed, file
        )


def read_environment(settings: type[BaseModel]) -> dict[str, Setting]:
    """Settings of the variables KVSTORE_<SECTION>__<FIELD>.

    Any other variable with our prefix is a mistake somebody would search for long, so it is an error too.
    """
    data: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    problems = []
    for name, value in os.environ.items():
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in OTHER_VARIABLES:
            continue
        section, _, field = upper.removeprefix(PREFIX).lower().partition(DELIMITER)
        try:
            model = section_model(settings, section)
        except ConfigError as error:
            problems.append(f"environment variable {name}: {error}")
            continue
        if model is not None and field in model.model_fields:
            names[f"{section}.{field}"] = name
            data.setdefault(section, {})[field] = value
        elif not _SERVICE_LINK.fullmatch(upper):
            expected = [
                variable(f"{section}.{field}") for section, fields in known_fields(settings).items() for field in fields
            ]
            hint = _did_you_mean(upper, expected)
            if field and model is None and not _close(upper, expected):
                hint = f"; {registry.unknown(section)}"
            if f"{section}.{field}" in _REMOVED:
                hint = f"; {_REMOVED[f'{section}.{field}']}"
            problems.append(f"environment variable {name} is unknown{hint}")
    _raise_if_any(problems)
    return _flatten(settings, data, lambda name: f"environment {names.get(name, name)}")


def read_keywords(settings: type[BaseModel], overrides: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings of `host={"capacity_bytes": ...}`, of a section object, or of "host.capacity_bytes" itself.

    A value may be a Setting: it then says where it came from (an option of a command).
    """
    origins = {key: value.origin for key, value in overrides.items() if isinstance(value, Setting)}
    data: dict[str, Any] = {}
    for key, given in overrides.items():
        value = given.value if isinstance(given, Setting) else given
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
    return _flatten(settings, data, lambda name: origins.get(name, KEYWORD))


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


def explain(
    settings: type[BaseModel], error: ValidationError, given: Mapping[str, Setting] | None, *, section: str = ""
) -> ConfigError:
    """Say in our words what a validation found: field, value, source, and what would be right.

    given:   what was read, by full name; None where all values are keyword arguments.
    section: that was validated by itself; "" where all were.
    """
    problems = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in ((section,) if section else ()) + item["loc"][: 1 if section else 2])
        setting = (given or {}).get(name, Setting(item["input"], KEYWORD if given is None else "default"))
        if item["type"] == "extra_forbidden":
            problems.append(_unknown(name, setting.origin, known_fields(settings)))
        else:
            value = f"{name} is {_shown(settings, name, setting.value)} (from {setting.origin})"
            problems.append(f"{value}; {_what_is_right(name, item['msg'])}")
    return ConfigError("\n".join(problems))


def _flatten(settings: type[BaseModel], data: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Setting]:
    flat: dict[str, Setting] = {}
    problems = []
    for section, values in data.items():
        try:
            model = section_model(settings, section)
        except ConfigError as error:
            problems.append(f"{section} (from {origin(section)}): {error}")
            continue
        if model is None:
            problems.append(unknown_section(settings, section, values, origin(section)))
        elif not isinstance(values, Mapping):
            value = f"{section} is {_shown(settings, section, values)} (from {origin(section)})"
            problems.append(f"{value}; it is a section with fields such as {section}.{next(iter(model.model_fields))}")
        else:
            for field, value in values.items():
                name = f"{section}.{field}"
                if field in model.model_fields:
                    flat[name] = Setting(value, origin(name))
                else:
                    problems.append(_unknown(name, origin(name), known_fields(settings)))
    _raise_if_any(problems)
    return flat


def unknown_section(settings: type[BaseModel], section: str, values: Any, origin: str) -> str:
    """Say that there is no such section: a name mistyped, or a tier that is not installed."""
    told = _unknown(section, origin, known_fields(settings))
    if "; did you mean " in told or not isinstance(values, Mapping):
        return told
    fields = [f"{section}.{field}" for field in values] or [section]
    return f"{', '.join(fields)} (from {origin}) is unknown; {registry.unknown(section)}"


def _unknown(name: str, origin: str, sections: Mapping[str, Sequence[str]]) -> str:
    names = [f"{section}.{field}" for section, fields in sections.items() for field in fields]
    section, _, field = name.partition(".")
    same_field = [full for full in names if full.endswith("." + (field or section))]
    if name in _REMOVED:
        hint = f"; {_REMOVED[name]}"
    elif same_field:
        hint = f"; did you mean {' or '.join(same_field)}?"
    elif section in sections:
        hint = _did_you_mean(name, [f"{section}.{known}" for known in sections[section]])
    else:
        hint = _did_you_mean(name, names if field else list(sections))
    return f"{name} (from {origin}) is unknown{hint}"


def _close(wrong: str, right: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(wrong, right, n=1, cutoff=0.6)


def _did_you_mean(wrong: str, right: Sequence[str]) -> str:
    close = _close(wrong, right)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(right)}"


def _shown(settings: type[BaseModel], name: str, value: Any) -> str:
    kind = secrecy(settings, name)
    if kind is SecretStr:
        return "***"
    if kind is SecretUrl:
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
