"""Lossy codecs: pages of keys and values in 8, 6 or 4 bits an element, for layouts that tell what lies where.

    codec      id  bits  scales                                              size      relative error that is let pass
    near        2     8  K: a channel of 64 tokens, V: a token               1/1.95    0.03
    compact     3     6  K: a channel of 64 tokens, V: a token, 64 channels  1/2.46    0.06
    small       4     4  K: a channel of 32 tokens, V: a token, 32 channels  1/3.20    0.2

K has channels that are large in every token, V has not: so a scale goes along tokens in K and along channels in V
(KIVI, Liu et al., 2024). Token 0 of a prompt is the sink of attention and unlike all others: where it costs the other
tokens of its page precision, it stays as it is. docs/codecs.md has the quality and how it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvstore.codecs.loss import Loss
from kvstore.codecs.quant import Quantizer
from kvstore.errors import ConfigError
from kvstore.layout import GroupKind, Layout, TensorAxes

WHOLE_ROW = 1024  # channels: a scale for the whole token


@dataclass(frozen=True, slots=True)
class LossyCodec:
    """How pages of a class are coded.

    max_error: the largest relative error of a tensor (L2) that is let pass; what is above is stored without loss.
    keeps_first: token 0 of a prompt stays as it is.
    """

    loss: Loss
    id: int
    bits: int
    key_group: int
    value_group: int
    max_error: float
    keeps_first: bool

    @property
    def name(self) -> str:
        """As in configurations."""
        return self.loss.word


LOSSY = (
    LossyCodec(Loss.NEAR, 2, 8, 64, WHOLE_ROW, 0.03, keeps_first=True),
    LossyCodec(Loss.COMPACT, 3, 6, 64, 64, 0.06, keeps_first=True),
    LossyCodec(Loss.SMALL, 4, 4, 32, 32, 0.2, keeps_first=True),
)


def why_opaque(layout: Layout, group: int) -> str:
    """The reason that pages of a layer group cannot be coded with loss; "" if they can."""
    kind, axes = layout.groups[group].kind, layout.groups[group].axes
    if kind not in (GroupKind.FULL, GroupKind.SLIDING):
        return f"layer group {group} is of kind {kind.value}"
    if not axes:
        return (
            f"the layout does not tell what lies where in a page of layer group {group} "
            f"({layout.format.partition(';')[0]}, {layout.dtype})"
        )
    return ""


def quantizer_of(codec: LossyCodec, layout: Layout, group: int, *, compiled: bool = True) -> Quantizer:
    """The encoding of a layer group's pages. Raises ConfigError for a group whose pages cannot be coded with loss."""
    reason = why_opaque(layout, group)
    if reason:
        raise ConfigError(f"codec is {codec.name!r}, but {reason}; exact and lossless take any page")
    one = layout.groups[group]
    axes = _all_shards(one.axes, one.page_bytes, layout.shards)
    try:
        return Quantizer(
            axes, layout.stored_bytes(group), codec.bits, codec.key_group, codec.value_group, compiled=compiled
        )
    except ValueError as error:
        raise ConfigError(
            f"codec is {codec.name!r}, but pages of layer group {group} cannot be coded: {error}"
        ) from error


def _all_shards(axes: tuple[TensorAxes, ...], page_bytes: int, shards: int) -> list[TensorAxes]:
    return [replace(one, offset=one.offset + shard * page_bytes) for shard in range(shards) for one in axes]
