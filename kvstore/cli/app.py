"""The commands put together, and what happens to an error on the way out.

An error this package raises on purpose is an answer, not an accident: one red line that says what to do, exit code 2.
`kvstore --debug COMMAND` shows the traceback behind it.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvstore import names
from kvstore.cli.bench import bench
from kvstore.cli.cluster import cluster
from kvstore.cli.codec import codec
from kvstore.cli.command import Command, untyped_flags
from kvstore.cli.config import config
from kvstore.cli.demo import demo
from kvstore.cli.doctor import doctor
from kvstore.cli.inspect import inspect
from kvstore.cli.llamacpp import llamacpp
from kvstore.cli.load import LoadCommand, load
from kvstore.cli.prefix import prefix
from kvstore.cli.record_events import record_events
from kvstore.cli.redis import redis
from kvstore.cli.replay import replay
from kvstore.cli.replica import replica
from kvstore.cli.router import router
from kvstore.cli.serve import serve
from kvstore.cli.top import top
from kvstore.cli.verify import verify
from kvstore.cli.vllm import vllm
from kvstore.console import print_error
from kvstore.errors import KVStoreError

EXIT_ERROR = 2

HELP = """
Keeps the KV cache of LLM prompts in host memory, on disk and in Redis, so that a prefix is computed once.

Begin with [bold]kvstore demo[/]; [bold]kvstore COMMAND --help[/] teaches the rest.
"""

FIRST, CLUSTER, DISK = "First steps", "A cluster, and what a cache does for one's traffic", "A disk tier, also in use"


class CommandGroup(TyperGroup):
    """Turns errors into one line each."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options, that of the help too."""
        return untyped_flags(super().get_params(ctx))

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KVStoreError as error:
            if ctx.params.get("debug"):
                raise
            print_error(str(error))
        except ModuleNotFoundError as error:
            # A module of ours that is not there: somebody else's package has the name, or a folder hides ours.
            name = (error.name or "").partition(".")[0]
            problem = names.clash(name) if name in names.PACKAGES else ""
            if ctx.params.get("debug") or not problem:
                raise
            print_error(problem)
        except OSError as error:
            # Files and directories named on the command line; anything without a name is a bug and keeps its traceback.
            if ctx.params.get("debug") or error.filename is None:
                raise
            print_error(f"{error.filename}: {error.strerror}")
        raise typer.Exit(EXIT_ERROR)


app = typer.Typer(
    cls=CommandGroup,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from kvstore.lab.machine import native, package_version

        twins = ", ".join(f"{what} in {'C' if fast else 'Python'}" for what, fast in native().items())
        typer.echo(f"kvstore {package_version()} ({twins})")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback behind an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    rich_help_panel=FIRST,
)(demo)
app.command(cls=Command, rich_help_panel=FIRST)(config)
app.command(cls=Command, rich_help_panel=FIRST)(doctor)
app.command(cls=Command, rich_help_panel=FIRST)(serve)
app.command(cls=Command, rich_help_panel=FIRST)(top)
app.command(cls=Command, rich_help_panel=FIRST)(bench)
app.command(cls=Command, rich_help_panel=CLUSTER)(replica)
app.command(cls=Command, rich_help_panel=CLUSTER)(vllm)
app.command(cls=Command, rich_help_panel=CLUSTER)(llamacpp)
app.command(cls=Command, rich_help_panel=CLUSTER)(router)
app.add_typer(cluster, name="cluster", rich_help_panel=CLUSTER)
app.command(cls=LoadCommand, rich_help_panel=CLUSTER)(load)
app.command(cls=Command, no_args_is_help=True, rich_help_panel=CLUSTER)(replay)
app.add_typer(codec, name="codec", rich_help_panel=CLUSTER)
app.add_typer(redis, name="redis", rich_help_panel=CLUSTER)
app.command("record-events", cls=Command, no_args_is_help=True, rich_help_panel=CLUSTER)(record_events)
app.command(cls=Command, no_args_is_help=True, rich_help_panel=CLUSTER)(prefix)
app.command(cls=Command, no_args_is_help=True, rich_help_panel=DISK)(inspect)
app.command(cls=Command, no_args_is_help=True, rich_help_panel=DISK)(verify)
