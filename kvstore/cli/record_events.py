"""`kvstore record-events`: writes down what an engine publishes of its KV cache."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from kvstore.console import console
from kvstore.units import parse_seconds


def record_events(
    endpoint: Annotated[
        str, typer.Argument(help="Such as tcp://127.0.0.1:5557; tcp://*:5557 if the publisher connects.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write to the end of.")],
    topic: Annotated[str, typer.Option(help="Only messages whose topic begins so.")] = "",
    duration: Annotated[str | None, typer.Option("--for", help="Stop after this time, such as 1h.")] = None,
) -> None:
    """Write down the KV events of a vLLM or SGLang engine, for `kvstore replay`, until Ctrl-C.

    Start the engine with its publisher on (vLLM: --kv-events-config). Token ids and salts, which go over the wire in
    clear, are not written. The file shows what was stored and removed, not what was hit.
    """
    from kvstore.errors import ConfigError
    from kvstore.lab.traces.event_recorder import Recorded, listen, record

    end = float("inf")
    if duration is not None:
        try:
            end = time.monotonic() + parse_seconds(duration)
        except ValueError as error:
            raise ConfigError(f"--for {duration}: {error}") from None
    progress = console(stderr=True)
    counted = Recorded()

    def tell(now: Recorded) -> None:
        nonlocal counted
        counted = now
        status.update(f"{now.num_messages} messages, {now.num_missed} missed")

    with progress.status(f"listening to {endpoint}") as status, suppress(KeyboardInterrupt):
        counted = record(listen(endpoint, topic, lambda: time.monotonic() >= end), out, endpoint, tell)
    if not counted.num_messages:
        progress.print(
            "nothing came: does the engine publish there? vLLM waits for listeners at tcp://*:PORT only; to any other "
            "address it connects, and tcp://*:PORT has to be given here",
            soft_wrap=True,
        )
    progress.print(
        f"{out}: {counted.num_messages} messages, {counted.num_missed} missed, {counted.num_bad} of another kind",
        markup=False,
        soft_wrap=True,
    )
