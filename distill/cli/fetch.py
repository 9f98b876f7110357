"""`distill fetch`: a teacher of the hub, before it is needed."""

from typing import Annotated

import typer

from distill.cli.options import TEACHER


def fetch(teacher: Annotated[str, typer.Argument(help=TEACHER)]) -> None:
    """Fetch a teacher of the Hugging Face Hub, so that runs, jobs and machines without a network find it in the cache.

    Only what is loaded is fetched: one variant of the weights in safetensors. Run the same command again to resume.
    Prints commit, size and folder. For a teacher that is not of the hub, nothing is fetched.
    """
    from distill.models.teacher import open_teacher

    found = open_teacher(teacher)
    size = sum(path.stat().st_size for path in found.path.rglob("*") if path.is_file())
    typer.echo(f"{found.reference}: {size / 1e9:.3g} GB in {found.path}")
