"""How the bytes of one page are cut into Redis values.

A Redis built with jemalloc accounts a string with its whole block, and those come in sizes that step by a quarter of a
power of two. A page of 2^k bytes with a header before it lands just above a class and costs 1.25 times its bytes of
`maxmemory`; not of RAM, since the end of the block is never touched, and nothing of either on builds with libc's
allocator, where the cut costs a second key and does no harm. So a value that would waste
more than 1/32 is cut once: the first part fills the class below to the brim, the rest is small and goes under a key of
its own. The rest is less than a quarter of the page, so what it wastes is again less than 1/32.

Values far above 2 MiB cost the server two to three times the CPU per byte and make every other client wait, so pages
above 4 MiB are first cut into parts of 2 MiB.

The rule is part of the format (docs/formats.md): a reader derives the parts from the header and refuses any other.
"""

from __future__ import annotations

KiB = 1 << 10
MiB = 1 << 20

# A Redis string carries 10 to 12 bytes beside its text; 64 leaves room for servers that keep more.
SLACK_BYTES = 64
# What a second key costs the server: dictionary entries, key, object and expiry, measured 180 to 230 bytes.
KEY_BYTES_ON_SERVER = 256
WASTE_SHARE = 32  # one part in 32, about 3 %
PART_BYTES = 2 * MiB - SLACK_BYTES
WHOLE_BYTES = 4 * MiB + 128 * KiB  # up to here a page is one value and its rest: 4 MiB, header, any tokens
MAX_PARTS = 256  # one byte numbers them


def size_class(num_bytes: int) -> int:
    """The jemalloc block that holds `num_bytes`: four classes per doubling, never finer than 16 bytes."""
    step = max(16, 1 << ((num_bytes - 1).bit_length() - 3) if num_bytes > 8 else 16)
    return -(-num_bytes // step) * step


def part_sizes(total: int) -> list[int]:
    """The lengths of the values of a page whose header, tokens and body are `total` bytes.

    >>> part_sizes(96_000), part_sizes(2 * MiB + 128), part_sizes(6 * MiB + 128)
    ([96000], [2097088, 192], [2097088, 4194240, 256])
    """
    parts: list[int] = []
    while total > WHOLE_BYTES:
        parts.append(PART_BYTES)
        total -= PART_BYTES
    block = size_class(total + SLACK_BYTES)
    if block - total <= total // WASTE_SHARE + KEY_BYTES_ON_SERVER:
        return [*parts, total]
    full = _class_below(block) - SLACK_BYTES
    return [*parts, full, total - full]


def max_parts(total: int) -> int:
    """No page of up to `total` bytes has more parts than this."""
    return max(0, -(-(total - WHOLE_BYTES) // PART_BYTES)) + 2


def _class_below(block: int) -> int:
    step = 1 << ((block - 1).bit_length() - 3)
    return block - step
