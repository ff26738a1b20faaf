"""`kvstore config`: the effective configuration, and where each value came from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvstore.cli.options import ConfigFile
from kvstore.console import add_row, console, print_json, table
from kvstore.errors import ConfigError


def config(
    file: ConfigFile = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Try a value, e.g. host.ttl_s=10min."),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what each field does.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference of all fields.")] = False,
) -> None:
    """Print the effective configuration and where each value comes from.

    Lowest to highest: defaults, the TOML file, environment variables KVSTORE_<SECTION>__<FIELD>, --set.
    A wrong value or an unknown name is told with what would be right, and exit code 2.
    """
    from kvstore.config import reference
    from kvstore.config.sections import Config

    if markdown:
        typer.echo(reference.markdown(), nl=False)
        return
    rows = reference.effective(Config.load(file, **overrides(setting or [])))
    if as_json:
        print_json({row.field: {"value": row.json_value, "source": row.source} for row in rows})
        return
    output = table("field", "value", "from", *(["what it does"] if explain else []))
    section = ""
    for row in rows:
        if section and not row.field.startswith(section):
            output.add_section()
        section = row.field.partition(".")[0] + "."
        style = None if row.source == "default" else "bold"
        add_row(output, row.field, row.text, row.source, *([row.description] if explain else []), style=style)
    console().print(output)


def overrides(assignments: list[str]) -> dict[str, Any]:
    """The values of `--set FIELD=VALUE` options, as Settings."""
    from kvstore.config.sources import Setting

    values: dict[str, Any] = {}
    for text in assignments:
        field, equals, value = text.partition("=")
        if not equals:
            from kvstore.config.secret import mask_url

            raise ConfigError(
                f"--set {mask_url(text)}: there is no value; write it as FIELD=VALUE, e.g. host.ttl_s=10min"
            )
        values[field.strip()] = Setting(value.strip(), "--set")
    return values
