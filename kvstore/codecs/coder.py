"""The coder of a tier: which codec a page is stored in, and whether a reader may have what comes back.

A page's key names the most that its readers let be lost (loss.py). It is stored in the tier's codec or, where that
loses more than they allow, in the one that loses as much as they do. What a lossy codec would spoil is stored without
loss, and counted. What comes back is refused if it lost more than the key allows: a reader's word holds against any
writer.

Any thread.
"""

from __future__ import annotations

import threading

from kvstore.codecs.base import Codec
from kvstore.codecs.exact import ExactCodec
from kvstore.codecs.loss import Loss, loss_of, loss_of_codec
from kvstore.codecs.lossy import LOSSY, LossyCodec, quantizer_of
from kvstore.codecs.quant import Quantizer
from kvstore.codecs.table import codec_by_id, codec_by_name
from kvstore.errors import ConfigError, CorruptPage
from kvstore.layout import SLOT_ALIGNMENT, Layout
from kvstore.page import PageKey, PageMeta, split_key

_BY_LOSS = {codec.loss: codec for codec in LOSSY}
_BY_ID = {codec.id: codec for codec in LOSSY}


LOSSY_STORED, LOSSY_READ = "lossy_stored", "lossy_read"  # pages
GUARDED = "guarded"  # pages that a lossy codec would have spoiled, stored without loss


class UnreadablePage(CorruptPage):
    """A page that is whole, in a codec that this process does not have."""


class PageCoder:
    """Encodes and decodes the pages of one layout for one tier.

    codec:  exact, lossless, near, compact or small.
    layout: of the pages; without it none is stored with loss, and none that was can be read.

    Raises ConfigError for another one, for one whose package is missing, and for a lossy one where the layout does not
    tell what lies where in a page.
    """

    def __init__(self, codec: str = "exact", layout: Layout | None = None) -> None:
        self.loss = loss_of_codec(codec)
        self._count_lock = threading.Lock()
        self.counters = dict.fromkeys((LOSSY_STORED, LOSSY_READ, GUARDED), 0)
        self._codec = ExactCodec() if self.loss else codec_by_name(codec)
        self._without_loss = _lossless_if_installed() if self.loss else self._codec
        self._layout = layout
        self._quantizers: dict[tuple[int, int], Quantizer] = {}
        self.slot_bytes = 0 if layout is None else layout.slot_bytes
        if self.loss:
            self.slot_bytes = self._lossy_slot_bytes(_BY_LOSS[self.loss])

    def count_in(self, counters: dict[str, int]) -> None:
        """Count in a tier's own counters from now on; before its first page."""
        if self._layout is not None:  # else there is nothing to count
            counters.update(self.counters)
            self.counters = counters

    @property
    def stores_as_is(self) -> bool:
        """True if every page is stored as it is."""
        return not self.loss and self._codec.id == ExactCodec.id

    def has_room_for(self, key: PageKey) -> bool:
        """True if a slot of `slot_bytes` takes the page of this name, unless the codec would spoil it."""
        group, loss = split_key(key)[1], min(self.loss, loss_of(key))
        if self._layout is None or loss is self.loss or self._is_state(group):
            return True
        if not loss:
            return self._layout.stored_bytes(group) <= self.slot_bytes
        codec = _BY_LOSS[loss]
        return self._quantizer(codec, group).coded_bytes(int(codec.keeps_first)) <= self.slot_bytes

    def encode(
        self, key: PageKey, meta: PageMeta, page: memoryview, out: memoryview | None = None
    ) -> tuple[memoryview, int]:
        """The bytes to store of a page, and the id of their codec.

        out: room for them, if there is any; else it is made. What no codec makes smaller is the page itself.
        """
        loss = min(self.loss, loss_of(key)) if self.loss else Loss.EXACT
        codec: Codec = self._codec
        if loss:
            coded = self._encode_lossy(_BY_LOSS[loss], key, meta, page, out)
            if coded is not None:
                return coded
        if self.loss:
            codec = self._without_loss
        if codec.id == ExactCodec.id:
            return page, codec.id
        most = codec.max_bytes(page.nbytes)
        room = memoryview(bytearray(most)) if out is None or len(out) < most else out
        num_bytes = codec.encode(page, room)
        return (room[:num_bytes], codec.id) if num_bytes < page.nbytes else (page, ExactCodec.id)

    def decode(self, key: PageKey, codec_id: int, stored: memoryview, page: memoryview) -> None:
        """Fill `page`. Raises CorruptPage for what is no page, UnreadablePage for a codec that is not here."""
        lossy = _BY_ID.get(codec_id)
        if lossy is None:
            _plain(codec_id).decode(stored, page)
            return
        if lossy.loss > loss_of(key):
            raise CorruptPage(f"a page in codec {lossy.name} under a key whose readers take {loss_of(key).word}")
        try:
            quantizer = self._quantizer(lossy, split_key(key)[1])
        except ConfigError as error:
            raise UnreadablePage(str(error)) from error
        quantizer.decode(stored, page)
        self._count(LOSSY_READ)

    def _lossy_slot_bytes(self, codec: LossyCodec) -> int:
        """A slot for the largest page that comes out of the codec, or has to do without it."""
        if self._layout is None:
            raise ConfigError(f"codec is {codec.name!r}: it needs a layout that tells what lies where in a page")
        most = max(
            self._layout.stored_bytes(group)
            if self._is_state(group)
            else self._quantizer(codec, group).coded_bytes(int(codec.keeps_first))
            for group in range(len(self._layout.groups))
        )
        return -(-most // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    def _is_state(self, group: int) -> bool:
        """A piece of a recurrent state loses nothing: what it lost would feed back into all that follows."""
        assert self._layout is not None
        return self._layout.groups[group].is_state

    def _encode_lossy(
        self, codec: LossyCodec, key: PageKey, meta: PageMeta, page: memoryview, out: memoryview | None
    ) -> tuple[memoryview, int] | None:
        """None where it would lose more than the codec's bound."""
        group = split_key(key)[1]
        if self._is_state(group):
            return None
        quantizer = self._quantizer(codec, group)
        skip = int(codec.keeps_first and meta.depth == 0)
        num_bytes = quantizer.coded_bytes(skip)
        is_fit = page.nbytes == quantizer.page_bytes and num_bytes < page.nbytes
        if is_fit:
            room = memoryview(bytearray(num_bytes)) if out is None or len(out) < num_bytes else out[:num_bytes]
            is_fit = quantizer.encode(page, room, skip) <= codec.max_error
        self._count(LOSSY_STORED if is_fit else GUARDED)
        return (room, codec.id) if is_fit else None

    def _count(self, what: str) -> None:
        with self._count_lock:
            self.counters[what] += 1

    def _quantizer(self, codec: LossyCodec, group: int) -> Quantizer:
        found = self._quantizers.get((codec.id, group))
        if found is None:
            if self._layout is None or group >= len(self._layout.groups):
                raise ConfigError(f"codec {codec.name}: there is no layout of layer group {group}")
            found = self._quantizers[codec.id, group] = quantizer_of(codec, self._layout, group)
        return found


def _lossless_if_installed() -> Codec:
    try:
        return codec_by_name("lossless")
    except ConfigError:
        return ExactCodec()


def _plain(codec_id: int) -> Codec:
    """Raises UnreadablePage for a codec of a later release, or one whose package is missing: others can read it."""
    try:
        return codec_by_id(codec_id)
    except (CorruptPage, ConfigError) as error:
        raise UnreadablePage(str(error)) from error
