"""Codecs turn a page's raw bytes into stored bytes and back; the page header names the codec by id.

Slow media use them (Redis, a network); the disk tier stores raw bytes, since a lossless encoder is slower than NVMe.
All codecs here are lossless for any bytes, also for pages that are not what the codec was made for.

    raw      0   the bytes as they are
    planes   1   for bfloat16: the exponents are split off and compressed with zstd, sign and mantissa stay raw

Exponents of real KV carry about 2.7 of 8 bits, sign and mantissa 7.9: so `planes` gives nearly all that lossless can
give (1.44x to 1.48x of a bound of 1.49x on SmolLM2) at more than twice the speed of compressing both. The idea is
ZipNN's (Hershcovitch et al., 2024).

Any thread.
"""

from __future__ import annotations

import struct
import threading
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError, CorruptPage
from kvstore.extras import how_to_install

Bytes8 = npt.NDArray[np.uint8]


class Codec(Protocol):
    """A reversible encoding of pages."""

    name: str
    id: int

    def max_bytes(self, raw_bytes: int) -> int:
        """The most bytes `encode` can make of a page of `raw_bytes`."""

    def encode(self, page: memoryview, out: memoryview) -> int:
        """Write the encoding of `page` to the head of `out` (at least `max_bytes` long); return its length."""

    def decode(self, blob: memoryview, out: memoryview) -> None:
        """Fill all of `out` with the page that `blob` encodes. Raises CorruptPage if it is not one of that length."""


class RawCodec:
    """Stores the bytes as they are."""

    name = "raw"
    id = 0

    def max_bytes(self, raw_bytes: int) -> int:
        """As many as the page has."""
        return raw_bytes

    def encode(self, page: memoryview, out: memoryview) -> int:
        """Copy."""
        np.copyto(_array(out)[: page.nbytes], _array(page))
        return page.nbytes

    def decode(self, blob: memoryview, out: memoryview) -> None:
        """Copy back."""
        if blob.nbytes != out.nbytes:
            raise CorruptPage(f"raw page has {blob.nbytes} bytes, not {out.nbytes}")
        np.copyto(_array(out), _array(blob))


class PlanesCodec:
    """Exponent plane compressed, the rest raw; see the module's head. Needs the `zstandard` package.

    Encoding: length of the exponent part u32 LE | exponent part | sign and mantissa, one byte an element | the odd last
              byte, if any.
    An exponent part as long as the plane itself is the plane itself (it did not shrink); a shorter one is a zstd frame.
    """

    name = "planes"
    id = 1

    _LENGTH = struct.Struct("<I")
    # Exponents have no repeats worth finding, only a skewed distribution that drifts from head to head. So zstd is kept
    # from looking for matches (long ones only, the smallest table) and made to begin a new Huffman table every 16 KiB.
    # On real KV of SmolLM2, 64 tokens a page: 1.483x at 710 MiB/s, where plain level 1 gives 1.435x at 300 MiB/s and
    # level 3 1.411x.
    _PARAMETERS: ClassVar[dict[str, int]] = {"min_match": 7, "hash_log": 6, "window_log": 14}

    def __init__(self) -> None:
        """Raises ConfigError if `zstandard` is not installed."""
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(
                f'codec is "planes": it needs the package zstandard; {how_to_install("codecs")}; or use codec "raw"'
            ) from error
        self._zstd: Any = zstandard
        self._local = threading.local()  # a zstd context serves one thread at a time

    def max_bytes(self, raw_bytes: int) -> int:
        """Both planes raw and the length."""
        return self._LENGTH.size + raw_bytes

    def encode(self, page: memoryview, out: memoryview) -> int:
        """Split the planes into `out` and compress one of them."""
        elements = _array(page)[: page.nbytes // 2 * 2].view("<u2")
        exponents = (elements >> 7).astype(np.uint8)
        packed = self._compressor().compress(exponents)
        head = exponents if len(packed) >= len(exponents) else np.frombuffer(packed, np.uint8)
        target = _array(out)
        self._LENGTH.pack_into(out, 0, len(head))
        rest = self._LENGTH.size + len(head)
        end = rest + len(elements)
        target[self._LENGTH.size : rest] = head
        target[rest:end] = ((elements >> 8) & 0x80) | (elements & 0x7F)
        if page.nbytes % 2:
            target[end] = page[-1]
        return end + page.nbytes % 2

    def decode(self, blob: memoryview, out: memoryview) -> None:
        """Merge the planes into `out`."""
        num_elements, odd = divmod(out.nbytes, 2)
        source = _array(blob)
        if len(source) < self._LENGTH.size:
            raise CorruptPage(f"planes page has {len(source)} bytes, too few for its own length field")
        (head_bytes,) = self._LENGTH.unpack_from(blob)
        rest = self._LENGTH.size + head_bytes
        if head_bytes > num_elements or len(source) != rest + num_elements + odd:
            raise CorruptPage(f"planes page has {len(source)} bytes; it does not decode to {out.nbytes}")
        exponents = self._exponents(source[self._LENGTH.size : rest], num_elements)
        signs = source[rest : rest + num_elements]
        elements = _array(out)[: num_elements * 2].view("<u2")
        np.left_shift(exponents, 7, out=elements, dtype=np.uint16)
        elements |= signs & np.uint8(0x7F)
        elements |= (signs & np.uint8(0x80)).astype(np.uint16) << 8
        if odd:
            out[-1:] = blob[-1:]

    def _exponents(self, head: Bytes8, num_elements: int) -> Bytes8:
        if len(head) == num_elements:
            return head
        try:
            # The frame says how much memory it wants: believe it only if it is what the page needs.
            if self._zstd.frame_content_size(head) != num_elements:
                raise CorruptPage("planes page: the exponent frame has another length than the page")
            plane = np.frombuffer(self._decompressor().decompress(head), np.uint8)
        except self._zstd.ZstdError as error:
            raise CorruptPage(f"planes page: the exponent frame does not decompress: {error}") from error
        if len(plane) != num_elements:
            raise CorruptPage(f"planes page: {len(plane)} exponents for {num_elements} elements")
        return plane

    def _compressor(self) -> Any:
        if not hasattr(self._local, "compressor"):
            parameters = self._zstd.ZstdCompressionParameters.from_level(1, **self._PARAMETERS)
            self._local.compressor = self._zstd.ZstdCompressor(compression_params=parameters)
        return self._local.compressor

    def _decompressor(self) -> Any:
        if not hasattr(self._local, "decompressor"):
            self._local.decompressor = self._zstd.ZstdDecompressor()
        return self._local.decompressor


_CODECS: tuple[type[RawCodec] | type[PlanesCodec], ...] = (RawCodec, PlanesCodec)
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


def _array(view: memoryview) -> Bytes8:
    return np.frombuffer(view, np.uint8)
