"""Options that several commands share, each by its name."""

from typing import Annotated

import typer

SOURCE = "txt, jsonl, csv or parquet file, folder of a saved data set, `scenes`, or - for stdin."

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
Guidance = Annotated[float | None, typer.Option(help="Teacher's scale; what its folder says if not given.")]
Compiled = Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the transformer first.")]
