"""Options that several commands share."""

import math
from typing import Annotated

import typer

SOURCE = "A txt, json, jsonl, csv, tsv or parquet file, a folder of them, a saved dataset, `scenes`, or - for stdin."
TEACHER = "`scenes`, or a folder of a Stable Diffusion 3."

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N. auto: a GPU if there is one.")]
LAST_SEED = 2**63 - 1  # highest first seed, from which further seeds count up
MOST = 10**10  # upper bound of options that count something


def finite(value: float | None) -> float | None:
    """Return the value of an option. Raises BadParameter for nan and inf, which range checks accept."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Seconds = Annotated[
    float | None,
    typer.Option(
        help="Budget in seconds of training, converted to images by the measured speed.",
        min=1,
        max=MOST,
        callback=finite,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale of the teacher; 1 is unguided. Default: the scale that its folder names.",
        min=1,
        max=100,
        callback=finite,
    ),
]
Column = Annotated[str | None, typer.Option(help="Column of the prompts. Default: prompt, caption or text.")]
Compiled = Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the transformer.")]
