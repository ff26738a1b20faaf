"""A URL that may carry a password, and must never show it.

Errors, logs, `kvstore config` and tracebacks all print settings sooner or later, so hiding is the default here and the
whole URL has to be asked for.
"""

from __future__ import annotations

from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from kvstore.errors import ConfigError
from kvstore.tiers.redis.url import mask_url as mask_url  # for whoever prints settings
from kvstore.tiers.redis.url import parse_redis_url


class SecretUrl:
    """A URL that may carry a password: printing, logging and dumping it show `***`; `reveal` gives it whole."""

    __slots__ = ("_url",)

    def __init__(self, url: str) -> None:
        self._url = url

    def reveal(self) -> str:
        """The URL with its password, for the client that connects."""
        return self._url

    def __str__(self) -> str:
        return mask_url(self._url)

    def __repr__(self) -> str:
        return f"SecretUrl({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretUrl) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._checked, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def _checked(cls, value: object) -> SecretUrl:
        if isinstance(value, SecretUrl):
            return value
        if not isinstance(value, str):
            raise ValueError("it must be text such as redis://:password@host:6379/0")
        try:
            parse_redis_url(value)
        except ConfigError as error:
            # "redis.url is ...; it ...": whoever reads the configuration tells field and value, with the source.
            raise ValueError(str(error).partition("; ")[2]) from None
        return cls(value)
