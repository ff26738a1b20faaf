"""`kvstore demo`: hands its arguments to the laboratory's demo, which is imported only when it runs."""

from __future__ import annotations

import typer

from kvstore.cli.command import Command
from kvstore.errors import KVStoreError
from kvstore.extras import how_to_install


def demo(ctx: typer.Context) -> None:
    """Play the whole store with a real model: cold, host, disk, Redis, a conversation, a fork.

    All arguments go to the demo itself; `kvstore demo --help` lists them.
    """
    try:
        from kvstore.demo.script import demo as play
    except ImportError as error:
        raise KVStoreError(f"the demo cannot start: {error}; {how_to_install('demo')}") from error
    player = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    player.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})(play)
    result = typer.main.get_command(player).main(args=ctx.args, prog_name="kvstore demo", standalone_mode=False)
    if isinstance(result, int) and result:
        raise typer.Exit(result)
