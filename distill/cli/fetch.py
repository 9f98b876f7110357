"""`distill fetch`: a teacher of the hub, before it is needed."""

from typing import Annotated

import typer

from distill.cli.options import TEACHER


def fetch(teacher: Annotated[str, typer.Argument(help=TEACHER)]) -> None:
    """Fetch a teacher from the Hugging Face Hub into the cache, for runs, server jobs and use without a network.

    Only what is loaded is fetched: one variant of the weights in safetensors. Run the same command again to resume.
    Prints commit, size and folder. Nothing is fetched for other teachers.
    """
    from distill.models.teacher import open_teacher

    found = open_teacher(teacher)
    size = sum(path.stat().st_size for path in found.path.rglob("*") if path.is_file())
    typer.echo(f"{found.reference}: {size / 1e9:.3g} GB in {found.path}")
