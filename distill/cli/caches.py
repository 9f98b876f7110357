"""`distill embed`, `encode` and `prompts stats`: caches of prompts and images for runs, and statistics of prompts."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import (
    LAST_SEED,
    MOST,
    SOURCE,
    TEACHER,
    Column,
    Device,
    TeacherBase,
    TextLength,
    open_given_teacher,
)

_IMAGES = (
    "A folder of images with .txt captions or a metadata.jsonl, a folder of WebDataset .tar shards, one such shard, "
    "or `scenes`."
)


def embed(
    teacher: Annotated[str, typer.Argument(help=TEACHER)],
    prompts: Annotated[str, typer.Argument(help=SOURCE)],
    out: Annotated[Path, typer.Option(help="Folder of the cache.", file_okay=False)],
    count: Annotated[int | None, typer.Option(help="Maximum number of prompts.", min=1, max=MOST)] = None,
    column: Column = None,
    shard_rows: Annotated[int, typer.Option(help="Maximum prompts per file; files stay under 1 GiB.", min=1)] = 4096,
    processes: Annotated[
        int,
        typer.Option(
            help="Number of processes, each with its own encoders; with cuda they use the GPUs in turn.", min=1
        ),
    ] = 1,
    max_sequence_length: TextLength = None,
    device: Device = "auto",
    teacher_base: TeacherBase = None,
) -> None:
    """Encode prompts into a cache, so that training needs no text encoder.

    A repeated prompt is encoded once. Run the same command again to resume: complete files are kept if the source still
    begins with their prompts.
    """
    from distill.config import Prompts
    from distill.data.prompts import read_prompts
    from distill.models.teacher import open_teacher
    from distill.training.preflight import check_source

    folder = open_teacher(teacher, teacher_base).with_sequence_length(max_sequence_length)
    check_source(Prompts(source=prompts, column=column), read_prompts)

    from distill.cli.console import image_bar
    from distill.data.embedding_cache import embed_prompts
    from distill.models.device import resolve_device
    from distill.training.run_lock import run_lock

    encoded = None
    where = resolve_device(device)
    with run_lock(out), image_bar("prompts", count, "prompts") as bar:
        texts = read_prompts(prompts, count, column=column)
        for encoded in embed_prompts(folder, texts, out, where, shard_rows, processes):
            bar.update(encoded.prompts + encoded.repeated, {"truncated": encoded.truncated})
        assert encoded is not None  # a source without prompts raises an error
        bar.update(read := encoded.prompts + encoded.repeated, total=read)  # a source may hold fewer than --count
    if encoded.truncated:
        typer.echo(f"{encoded.truncated} prompts are longer than the token limit and were cut.")
    repeated = f"; {encoded.repeated} repeated prompts were skipped" if encoded.repeated else ""
    typer.echo(f"The embeddings of {encoded.prompts} prompts are in {out}{repeated}.")


def encode(
    teacher: Annotated[str, typer.Argument(help=TEACHER)],
    images: Annotated[str, typer.Argument(help=_IMAGES)],
    out: Annotated[Path, typer.Option(help="Folder of the cache.", file_okay=False)],
    count: Annotated[int | None, typer.Option(help="Maximum number of images.", min=1, max=MOST)] = None,
    seed: Annotated[int, typer.Option(help="Seed of `scenes`.", min=0, max=LAST_SEED)] = 0,
    column: Annotated[
        str | None, typer.Option(help="Key of the captions in JSON. Default: the first of prompt, caption and text.")
    ] = None,
    shard_rows: Annotated[int, typer.Option(help="Maximum images per file; files stay under 1 GiB.", min=1)] = 4096,
    max_sequence_length: TextLength = None,
    device: Device = "auto",
    teacher_base: TeacherBase = None,
) -> None:
    """Encode real images and their captions into a cache, for methods that train on real images: RealUID, DMD2's GAN.

    Images are scaled and cropped to the teacher's native size. Unusable images are skipped and listed in skipped.jsonl;
    the command fails if they are more than 10 and more than 1 %. Run the same command again to resume: complete files
    are kept if the source still begins with their images.
    """
    from distill.config import RealImages
    from distill.data.images import read_examples
    from distill.models.teacher import open_teacher
    from distill.training.preflight import check_source

    folder = open_teacher(teacher, teacher_base).with_sequence_length(max_sequence_length)
    check_source(RealImages(source=images, column=column), read_examples)

    from distill.cli.console import image_bar
    from distill.data.image_cache import SKIPPED, encode_examples
    from distill.models.device import resolve_device
    from distill.training.run_lock import run_lock

    encoded = None
    where = resolve_device(device)
    with run_lock(out), image_bar("images", count) as bar:
        for encoded in encode_examples(folder, read_examples(images, count, seed, column), out, where, shard_rows):
            bar.update(encoded.images + encoded.skipped, {"skipped": encoded.skipped})
        assert encoded is not None  # a source without images raises an error
        bar.update(read := encoded.images + encoded.skipped, total=read)  # a source may hold fewer than --count
    if encoded.truncated:
        typer.echo(f"{encoded.truncated} captions are longer than the token limit and were cut.")
    if encoded.skipped:
        typer.echo(f"{encoded.skipped} images are unusable; {out / SKIPPED} lists them.")
    if encoded.unused:
        typer.echo(f"{encoded.unused} files of shards belong to no image; {out / SKIPPED} lists them.")
    typer.echo(f"The latents of {encoded.images} images are in {out}; use them in a run with real.source={out}.")


def stats(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    teacher: Annotated[
        str | None, typer.Option(help=f"Teacher whose tokenizers also measure lengths: {TEACHER}")
    ] = None,
    teacher_base: TeacherBase = None,
    column: Column = None,
) -> None:
    """Count the prompts, repetitions and empty lines of a source, and show the lengths of its distinct prompts."""
    from distill.cli.console import out, table
    from distill.data.prompt_stats import prompt_stats
    from distill.models.teacher import open_tokenizers

    found = prompt_stats(source, open_given_teacher(teacher, teacher_base, open_tokenizers), column)
    rows = []
    for name, spread in found.lengths.items():
        metrics = (spread.minimum, spread.median, spread.p95, spread.maximum)
        over = "" if spread.limit is None else f"{spread.over} over {spread.limit}"
        rows.append((name, *map(str, metrics), over))
    out.print(table("lengths", ("", "min", "median", "p95", "max", "over the limit"), rows))
    out.print(
        f"{found.prompts} prompts, {found.prompts - found.repeated} distinct, {found.repeated} repeated; "
        f"{found.empty} empty lines skipped."
    )
