"""`distill cifar10 teacher` and `images`: CIFAR-10 in pixel space."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Compiled, Device, Overrides
from distill.cli.stopping import train_with_bar

_CIFAR10 = "Folder of CIFAR-10's binary version, with data_batch_1.bin to data_batch_5.bin and test_batch.bin."
_CONDITIONAL = "Class names as captions. Default: the same word for all images."


def teacher(
    data: Annotated[Path, typer.Argument(help=_CIFAR10)],
    out: Annotated[Path, typer.Option(help="Folder of the teacher and its training state.", file_okay=False)] = Path(
        "runs/cifar10-teacher"
    ),
    overrides: Overrides = None,
    device: Device = "auto",
    compiled: Compiled = False,
) -> None:
    """Train a pixel-space teacher of CIFAR-10 in Stable Diffusion 3's format.

    Run the same command again to resume. A larger budget continues a finished training. The keys of `--set` are in
    docs/distill.md.
    """
    from distill.config import read_group
    from distill.models.device import resolve_device
    from distill.training.run_lock import run_lock
    from distill.worlds.cifar10.recipe import Cifar10Recipe
    from distill.worlds.cifar10.teacher import check_teacher_folder, train_teacher

    recipe = read_group(Cifar10Recipe, overrides or [])
    check_teacher_folder(out)
    with run_lock(out):
        train_with_bar("teacher", recipe.images, train_teacher(data, recipe, out, resolve_device(device), compiled))
    typer.echo(f"The teacher is in {out}; `distill run cifar10 --set teacher={out}` distills it.")


def images(
    data: Annotated[Path, typer.Argument(help=_CIFAR10)],
    out: Annotated[Path, typer.Option(help="Folder for the images and their captions.", file_okay=False)],
    test: Annotated[bool, typer.Option("--test", help="Use the test images.")] = False,
    conditional: Annotated[bool, typer.Option("--conditional", help=_CONDITIONAL)] = False,
) -> None:
    """Write the images as PNG files with captions, for `distill score --reference` and as `real.source` of a run."""
    from distill.cli.console import image_bar
    from distill.worlds.cifar10.data import write_images

    with image_bar("images", 10_000 if test else 50_000) as bar:
        for written in write_images(data, out, conditional, test):
            bar.update(written)
    typer.echo(f"The images are in {out}.")
