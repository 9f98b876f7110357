"""`distill generate`: images for people."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import LAST_SEED, SOURCE, Column, Device, Guidance


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.", metavar="PROMPT")] = None,
    file: Annotated[str | None, typer.Option(help=f"More prompts: {SOURCE}")] = None,
    column: Column = None,
    student: Annotated[Path | None, typer.Option(help="Student folder; the shipped one if not given.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Teacher folder, in place of a student.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the images.", file_okay=False)] = Path("runs/images"),
    count: Annotated[
        int | None, typer.Option(help="Images to make, going round the prompts; one of each if not given.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; it counts up.", min=0, max=LAST_SEED)] = 0,
    batch: Annotated[int, typer.Option(help="Images made together; it changes none of them.", min=1)] = 16,
    grid: Annotated[
        Path | None, typer.Option(help="PNG file for the first 64 images with their prompts.", dir_okay=False)
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Steps of an image; more than 1 for flow map students and teachers.", min=1)
    ] = 1,
    guidance: Guidance = None,
    device: Device = "auto",
) -> None:
    """Make an image of each prompt: with a student in one step, or with a teacher in many.

    Files are named by index and seed, and hold prompt and seed as text. An image's prompt with its seed makes it again.
    """
    from functools import partial
    from itertools import cycle, islice

    from distill.cli.console import image_bar
    from distill.data.prompts import read_prompts
    from distill.errors import ConfigError, PromptError
    from distill.evaluate.base import Generate
    from distill.evaluate.generate import generate_images
    from distill.evaluate.sampler import Setting, TeacherSampler, student_sampler
    from distill.models.device import resolve_device
    from distill.models.sd3_folder import SD3Folder
    from distill.pipeline import SHIPPED_STUDENT, OneStepPipeline

    if student is not None and teacher is not None:
        raise ConfigError("--student and --teacher are both given; one model makes the images")
    texts = [*(prompts or ()), *(read_prompts(file, column=column) if file is not None else ())]
    if not texts:
        raise PromptError("there is nothing to make; give prompts, or --file with a source of them")
    texts = list(islice(cycle(texts), count or len(texts)))
    where = resolve_device(device)
    if teacher is not None:
        sampler = TeacherSampler(SD3Folder.read(teacher), where)
        setting = Setting(steps, sampler.folder.guidance if guidance is None else guidance)
        make: Generate = partial(sampler.generate, setting)
        truncated = sampler.truncated
    else:
        pipeline = OneStepPipeline.load(student or SHIPPED_STUDENT, where)
        pipeline.spec.check_steps(steps)
        make, truncated = student_sampler(pipeline, steps), pipeline.truncated
    with image_bar("images", len(texts)) as bar:
        for made in generate_images(make, texts, seed, batch, out, grid):
            bar.update(made)
    cut = sum(truncated(texts))
    if cut:
        typer.echo(f"{cut} prompts are over the token limit; the model sees their beginnings.")
    typer.echo(f"The images are in {out}." if grid is None else f"The images are in {out}, the grid is {grid}.")
