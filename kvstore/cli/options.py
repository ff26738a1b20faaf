"""Options that several commands have: one wording, one type."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from kvstore.console import console


class ReplicaDtype(str, Enum):
    """Of weights and cache."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ListenHost = Annotated[str, typer.Option("--host", help="Address to listen on.")]
ListenPort = Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="Port; 0 takes any free one.")]
ReplicaName = Annotated[str, typer.Option("--name", help="How answers, metrics and logs call it.")]
MaxQueue = Annotated[int, typer.Option("--max-queue", min=1, help="Requests that may wait; more get a 429.")]
MaxTokensQueued = Annotated[
    int,
    typer.Option("--max-tokens-queued", min=1, help="Prompt and answer tokens of all that wait or run; beyond it 429."),
]
Drain = Annotated[
    float, typer.Option("--drain-s", min=0, help="At SIGTERM, longest wait in seconds for requests under way.")
]
EngineLog = Annotated[
    Path | None,
    typer.Option("--engine-log", metavar="FILE", help="For what the server to start prints; a temporary one if not."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--file", "-f", help="TOML file, instead of $KVSTORE_CONFIG or ./kvstore.toml.")
]
StoreSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Set a value of the store, e.g. disk.path=/srv/kv"),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")]


def announcer() -> Callable[[str], None]:
    """Print lines on standard error, as they are: paths and logs may have brackets in them."""
    errors = console(stderr=True)

    def announce(line: str) -> None:
        errors.print(line, markup=False, soft_wrap=True)

    return announce
