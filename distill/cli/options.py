"""Options that several commands share, each by its name."""

import math
from typing import Annotated

import typer

SOURCE = (
    "txt, json, jsonl, csv, tsv or parquet file, folder of such files or of a saved data set, `scenes`, or - for stdin."
)

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
LAST_SEED = 2**63 - 1  # highest first seed; further seeds count up from it
MOST = 10**10  # upper bound of options that count something


def finite(value: float | None) -> float | None:
    """The value of an option. Raises BadParameter for nan and inf, which range checks accept."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Seconds = Annotated[
    float | None,
    typer.Option(
        help="Budget in seconds of training; a measured speed makes images of it.", min=1, max=MOST, callback=finite
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Teacher's scale, 1 for none; what its folder says if not given.", min=1, max=100, callback=finite
    ),
]
Column = Annotated[
    str | None, typer.Option(help="Column of the prompts; the first of prompt, caption and text if not given.")
]
Compiled = Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the transformer first.")]
