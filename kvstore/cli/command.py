"""How the commands' help is set: a flag has no type, and a paragraph is filled to the terminal's width.

Typer shows the type of a flag (`<bool>`), which says nothing, and keeps the line breaks that a docstring has in its
source, which a narrower terminal breaks once more.
"""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperOption

_PARAGRAPHS = re.compile(r"\n[ \t]*\n")
_VERBATIM = "\b"  # first line of a paragraph whose lines stay as they are


class Command(TyperCommand):
    """A command with such a help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = filled(self.help)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return arguments and options, that of the help too."""
        return untyped_flags(super().get_params(ctx))


def filled(text: str | None) -> str | None:
    """Return a text with each paragraph in one line, but for those that begin with a line of `\\b`."""
    if text is None:
        return None
    paragraphs = _PARAGRAPHS.split(text)
    return "\n\n".join(
        paragraph if paragraph.lstrip(" \n").startswith(_VERBATIM) else " ".join(paragraph.split())
        for paragraph in paragraphs
    )


def untyped_flags(params: list[Any]) -> list[Any]:
    """Return the parameters; options that take no value show no type."""
    for param in params:
        if isinstance(param, TyperOption) and param.is_flag and param.metavar is None:
            param.metavar = ""
    return params
