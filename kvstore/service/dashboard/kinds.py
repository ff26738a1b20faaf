"""Which tiers there are, for the page: a module of their names, and a style sheet of their colours.

Made from the registry when they are first asked for, so that a tier of somebody else's has its row, line and colour.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from kvstore.tiers import registry

# For tiers that name no colour: apart from ours and from each other for people who see few colours (Okabe and Ito).
FREE = ("#cc79a7", "#56b4e9", "#8f7700", "#d55e00")
WHITE, BLACK = "#ffffff", "#10141a"

_RULES = """
.part.{name} {{ background: var(--{name}); }}
.legend .{name}::before {{ background: var(--{name}); }}
.map.split > .{name} {{ grid-column: auto; }}
.place.{name} {{ border-left-color: var(--{name}); }}
.split .flow.{name} {{ grid-template-columns: 1fr; }}
"""


def colors() -> dict[str, str]:
    """Return the colour of every lower tier, nearest first; imports every kind."""
    kinds, free = registry.kinds(), iter(FREE * len(registry.names()))
    return {name: (kinds[name].color if name in kinds else "") or next(free) for name in registry.names()}


def script() -> bytes:
    """Return the module that the page's own modules import."""
    return f"export const LOWER = {json.dumps(list(registry.names()))};\n".encode()


def sheet() -> bytes:
    """Return the colours, for light and for dark, and the rules that use them."""
    chosen = colors()
    light = (f"--{name}: {color}; --{name}-area: {_mixed(color, WHITE, 0.5)};" for name, color in chosen.items())
    dark = (
        f"--{name}: {_mixed(color, WHITE, 0.75)}; --{name}-area: {_mixed(color, BLACK, 0.6)};"
        for name, color in chosen.items()
    )
    rules = "".join(_RULES.format(name=name) for name in chosen)
    return f"{_root(light)}\n@media (prefers-color-scheme: dark) {{ {_root(dark)} }}\n{rules}".encode()


def _root(lines: Iterable[str]) -> str:
    return f":root {{ {' '.join(lines)} }}"


def _mixed(color: str, other: str, share: float) -> str:
    both = [[int(text[i : i + 2], 16) for i in (1, 3, 5)] for text in (color, other)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in zip(*both, strict=True))
