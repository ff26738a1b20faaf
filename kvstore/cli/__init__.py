"""The command `kvstore`.

`main` is the entry point. Nothing heavier than the command-line library is imported until a command runs:
`kvstore --help` is what people wait for most often.
"""


def main() -> None:
    """Run the command line of this process."""
    from kvstore.cli.app import app

    app(prog_name="kvstore")
