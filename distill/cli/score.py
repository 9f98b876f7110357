"""`distill score`: measure a folder of images with models that the user provides."""

import json
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Device


def score(
    folder: Annotated[Path, typer.Argument(help="Folder of images from `distill generate` or `distill geneval`.")],
    clip: Annotated[str | None, typer.Option(help="Folder or hub id of a CLIP model, for CLIP score and CMMD.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of real images, for CMMD and FID.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Inception weights in safetensors, for FID.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compute CLIP score, CMMD and FID of a folder of images, with models that you provide."""
    from distill.errors import ConfigError

    if clip is None and inception is None:
        raise ConfigError("no model is given; give --clip, or --inception with --reference")
    if inception is not None and reference is None:
        raise ConfigError("FID compares with real images; give their folder with --reference")
    from distill.evaluate.image_folder import find_images

    for images in (folder, reference):
        if images is not None:
            find_images(images)
    if inception is not None and not inception.is_file():
        raise ConfigError(f"--inception {inception} is no file; give weights in safetensors")

    from distill.cli.console import out, table
    from distill.evaluate.image_metrics import score_images
    from distill.models.device import resolve_device

    metrics = score_images(folder, clip, reference, inception, resolve_device(device))
    if as_json:
        typer.echo(json.dumps(metrics, indent=2))
        return
    out.print(table(str(folder), ("", ""), [(name, _format(value)) for name, value in metrics.items()]))


def _format(value: object) -> str:
    """Format a value of a table: a name, a number, or an interval."""
    if isinstance(value, tuple):
        return " to ".join(map(_format, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
