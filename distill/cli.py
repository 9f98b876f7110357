"""The `distill` command: parse, call, print. No command imports torch before it runs."""

import sys
from typing import Annotated

import typer

from distill.errors import DistillError

app = typer.Typer(
    help="Distil a Stable Diffusion 3 type teacher into a one-step student.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
scenes = typer.Typer(help="The small world that ships with the project.", no_args_is_help=True)
app.add_typer(scenes, name="scenes")


# commands are added here, one function each


def main() -> None:
    """Entry point of the console command: errors of ours become one sentence and status 2."""
    try:
        app()
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
