"""`kvstore codec check --model DIR`: what each lossy codec costs on a model, and whether its gate holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli.command import Command
from kvstore.console import add_row, console, print_json, table
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.lab.quality import QualityReport

EXIT_MISSED = 1

codec = typer.Typer(no_args_is_help=True, help="Look at codecs of pages.")


@codec.command(cls=Command)
def check(
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="A transformers model, or a .gguf file.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE", help="Prose of at least 640 tokens; more than one may be given."),
    ] = None,
    texts: Annotated[
        int, typer.Option("--texts", min=1, max=64, help="Without --text: how many texts of Python's own help.")
    ] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute what near, compact and small change in a model's answers; exit code 1 if one misses its gate.

    For each codec: how many times smaller pages become, the divergence of the next token's distribution (nats), how
    often the likeliest token stays, and how many numbers told early in a text are still found at its end; beside them
    what bfloat16 itself changes. Random weights say nothing: take the model that is served, or a small one of its
    family. Minutes on a CPU.

    \b
      kvstore codec check --model ~/models/SmolLM2-135M
      kvstore codec check --model gemma-3-270m.gguf --texts 4
    """
    if model is None:
        raise ConfigError("--model is missing: what a codec costs can only be told of a model; name its directory")
    from kvstore.lab.quality import check as measure
    from kvstore.lab.quality import load_model, usual_texts

    def tell(what: str) -> None:
        if not as_json:
            console(stderr=True).print(what, style="dim")

    prose = [_read(path) for path in text] if text else usual_texts(texts)
    loaded, tokenizer = load_model(model.expanduser())
    report = measure(loaded, tokenizer, prose, name=str(model), tell=tell)
    if as_json:
        print_json(_as_json(report))
    else:
        _print(report)
    if not all(row.passes for row in report.codecs):
        raise typer.Exit(EXIT_MISSED)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path} cannot be read: {error}") from None


def _as_json(report: QualityReport) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(report) | {"codecs": [asdict(row) | {"passes": row.passes} for row in report.codecs]}


def _print(report: QualityReport) -> None:
    numbers = ("codec", "smaller", "KL", "gate", "top-1", "largest error", "needles", "")
    listing = table(*numbers, right=numbers[1:-1], title=report.model)
    for row in report.codecs:
        add_row(
            listing,
            row.codec,
            f"{row.ratio:.2f}x",
            f"{row.kl:.1e}",
            "" if row.gate is None else f"{row.gate:.0e}",
            f"{row.top1:.1%}",
            f"{row.max_error:.3f}",
            f"{row.needles} of {report.num_needles}",
            "" if row.gate is None else "passes" if row.passes else "MISSES ITS GATE",
        )
    add_row(listing, "(bfloat16)", "", f"{report.floor_kl:.1e}", "", f"{report.floor_top1:.1%}", "", "", "")
    console().print(listing)
    console().print(
        f"{report.tokens} tokens of {report.texts} texts; (bfloat16): the model itself, against float32, nothing stored"
    )
