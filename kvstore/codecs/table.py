"""The table of codecs, by the name in a configuration and by the id in a page header."""

from __future__ import annotations

from kvstore.codecs.base import Codec
from kvstore.codecs.exact import ExactCodec
from kvstore.codecs.lossless import LosslessCodec
from kvstore.errors import ConfigError, CorruptPage

_CODECS: tuple[type[ExactCodec] | type[LosslessCodec], ...] = (ExactCodec, LosslessCodec)
CODEC_NAMES = tuple(codec.name for codec in _CODECS)


def codec_by_name(name: str) -> Codec:
    """The codec a configuration asks for. Raises ConfigError for a name that is none."""
    for codec in _CODECS:
        if codec.name == name:
            return codec()
    raise ConfigError(f"codec is {name!r}; it must be one of {', '.join(CODEC_NAMES)}")


def codec_by_id(codec_id: int) -> Codec:
    """The codec a page header names. Raises CorruptPage for an id this release does not know."""
    for codec in _CODECS:
        if codec.id == codec_id:
            return codec()
    raise CorruptPage(f"page header names codec {codec_id}; this release knows {[codec.id for codec in _CODECS]}")
