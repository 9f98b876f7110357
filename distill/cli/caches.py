"""`distill embed`, `encode` and `prompts stats`: what a run reads, made and looked at beforehand."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import LAST_SEED, MOST, SOURCE, Column, Device

_IMAGES = (
    "Folder of images, each with a .txt caption beside it or all in metadata.jsonl; folder of WebDataset .tar shards, "
    "or one of them; or `scenes`."
)


def embed(
    teacher: Annotated[Path, typer.Argument(help="Teacher folder.")],
    prompts: Annotated[str, typer.Argument(help=SOURCE)],
    out: Annotated[Path, typer.Option(help="Folder of the cache.", file_okay=False)],
    count: Annotated[int | None, typer.Option(help="Prompts to take at most.", min=1, max=MOST)] = None,
    column: Column = None,
    shard_rows: Annotated[int, typer.Option(help="Prompts of one file at most; it stays under 1 GiB.", min=1)] = 4096,
    processes: Annotated[
        int, typer.Option(help="Processes with encoders of their own; with cuda they take the GPUs in turn.", min=1)
    ] = 1,
    device: Device = "auto",
) -> None:
    """Encode prompts once, so that training holds no text encoder.

    A repeated prompt is encoded once. The same command continues one that was stopped or killed: files that are
    whole are kept, if the source still begins with the prompts that they hold.
    """
    from distill.cli.console import image_bar
    from distill.data.embedding_cache import embed_prompts
    from distill.data.prompts import read_prompts
    from distill.models.device import resolve_device
    from distill.models.sd3_folder import SD3Folder
    from distill.training.run_lock import run_lock

    encoded = None
    where = resolve_device(device)
    folder = SD3Folder.read(teacher)  # before the cache's folder is made
    with run_lock(out), image_bar("prompts", count) as bar:
        texts = read_prompts(prompts, count, column=column)
        for encoded in embed_prompts(folder, texts, out, where, shard_rows, processes):
            bar.update(encoded.prompts + encoded.repeated, {"truncated": encoded.truncated})
    assert encoded is not None  # a source without prompts is an error
    if encoded.truncated:
        typer.echo(f"{encoded.truncated} prompts are over the token limit; the model sees their beginnings.")
    repeated = f"; {encoded.repeated} more were repetitions of them" if encoded.repeated else ""
    typer.echo(f"The embeddings of {encoded.prompts} prompts are in {out}{repeated}.")


def encode(
    teacher: Annotated[Path, typer.Argument(help="Teacher folder.")],
    images: Annotated[str, typer.Argument(help=_IMAGES)],
    out: Annotated[Path, typer.Option(help="Folder of the cache.", file_okay=False)],
    count: Annotated[int | None, typer.Option(help="Images to take at most.", min=1, max=MOST)] = None,
    seed: Annotated[int, typer.Option(help="Seed of `scenes`.", min=0, max=LAST_SEED)] = 0,
    column: Annotated[
        str | None,
        typer.Option(help="Key of the captions in JSON; the first of prompt, caption and text if not given."),
    ] = None,
    shard_rows: Annotated[int, typer.Option(help="Images of one file at most; it stays under 1 GiB.", min=1)] = 4096,
    device: Device = "auto",
) -> None:
    """Encode real images and their captions once, for methods that learn from them too: RealUID, DMD2's GAN.

    Images are scaled and cut to the teacher's native size. One that cannot be used is passed over and named in
    skipped.jsonl; more than 10 that are more than 1 in 100 end the command. The same command continues one that was
    stopped or killed: files that are whole are kept, if the source still begins with the images that they hold.
    """
    from distill.cli.console import image_bar
    from distill.data.image_cache import SKIPPED, encode_examples
    from distill.data.images import read_examples
    from distill.models.device import resolve_device
    from distill.models.sd3_folder import SD3Folder
    from distill.training.run_lock import run_lock

    encoded = None
    where = resolve_device(device)
    folder = SD3Folder.read(teacher)  # before the cache's folder is made
    with run_lock(out), image_bar("images", count) as bar:
        for encoded in encode_examples(folder, read_examples(images, count, seed, column), out, where, shard_rows):
            bar.update(encoded.images, {"skipped": encoded.skipped})
    assert encoded is not None  # a source without images is an error
    if encoded.truncated:
        typer.echo(f"{encoded.truncated} captions are over the token limit; the model sees their beginnings.")
    if encoded.skipped:
        typer.echo(f"{encoded.skipped} images could not be used; {out / SKIPPED} names them.")
    if encoded.unused:
        typer.echo(f"{encoded.unused} files of shards belong to no image; {out / SKIPPED} names them.")
    typer.echo(f"The latents of {encoded.images} images are in {out}; real.source={out} in a run takes them.")


def stats(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    teacher: Annotated[Path | None, typer.Option(help="Teacher folder, to count in its tokens too.")] = None,
    column: Column = None,
) -> None:
    """Count a source's prompts, its repetitions and empty lines, and how long its different prompts are."""
    from distill.cli.console import out, table
    from distill.data.prompt_stats import prompt_stats
    from distill.models.sd3_folder import SD3Folder

    found = prompt_stats(source, None if teacher is None else SD3Folder.read(teacher), column)
    rows = []
    for name, spread in found.lengths.items():
        metrics = (spread.minimum, spread.median, spread.p95, spread.maximum)
        over = "" if spread.limit is None else f"{spread.over} over {spread.limit}"
        rows.append((name, *map(str, metrics), over))
    out.print(table("lengths", ("", "min", "median", "p95", "max", "over the limit"), rows))
    out.print(
        f"{found.prompts} prompts, {found.prompts - found.repeated} different, {found.repeated} repeated; "
        f"{found.empty} empty lines passed over."
    )
