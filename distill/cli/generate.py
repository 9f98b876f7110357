"""`distill generate`: generate images of prompts."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import (
    LAST_SEED,
    SOURCE,
    TEACHER,
    TEACHER_STEPS,
    Column,
    Decoder,
    Device,
    Guidance,
    SkipLayers,
    SkipScale,
    TeacherBase,
    check_decoder_choice,
    decoder_choice,
    open_given_teacher,
    teacher_guidance,
)


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.", metavar="PROMPT")] = None,
    file: Annotated[str | None, typer.Option(help=f"More prompts. {SOURCE}")] = None,
    column: Column = None,
    student: Annotated[Path | None, typer.Option(help="Student folder. Default: the shipped student.")] = None,
    teacher: Annotated[str | None, typer.Option(help=f"Instead of a student: {TEACHER}")] = None,
    teacher_base: TeacherBase = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.", file_okay=False)] = Path("runs/images"),
    count: Annotated[
        int | None, typer.Option(help="Number of images; prompts repeat in order. Default: one per prompt.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; seeds count up.", min=0, max=LAST_SEED)] = 0,
    batch: Annotated[int, typer.Option(help="Batch size; it does not change the images.", min=1)] = 16,
    grid: Annotated[
        Path | None, typer.Option(help="PNG file for a grid of the first 64 images with prompts.", dir_okay=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help=f"Sampling steps; only any-step students take several. Default: 1, with --teacher {TEACHER_STEPS}.",
            min=1,
        ),
    ] = None,
    guidance: Guidance = None,
    skip_layers: SkipLayers = "",
    skip_scale: SkipScale = None,
    decoder: Decoder = "auto",
    device: Device = "auto",
) -> None:
    """Generate an image of each prompt, with a student in one step or with a teacher in many.

    File names contain index and seed; the files hold prompt and seed as text. The same prompt and seed give the same
    image.
    """
    from itertools import cycle, islice

    from distill.cli.console import image_bar, note
    from distill.data.prompts import read_prompts
    from distill.errors import ConfigError, PromptError
    from distill.files import check_replaceable
    from distill.options import SHIPPED_STUDENT
    from distill.student.spec import read_student

    if student is not None and teacher is not None:
        raise ConfigError("--student and --teacher are both given; give one of them")
    if decoder != "auto" and teacher is not None:
        raise ConfigError("--decoder is of students; a teacher's images are decoded by its VAE")
    if not all(prompt.strip() for prompt in prompts or ()):
        raise PromptError("a prompt is empty; give some text, and check the quotes and variables of the shell")
    texts = [*(prompts or ()), *(read_prompts(file, column=column) if file is not None else ())]
    if not texts:
        raise PromptError("there are no prompts; give prompts or --file")
    texts = list(islice(cycle(texts), count or len(texts)))
    if grid is not None:
        check_replaceable(grid)
    folder = open_given_teacher(teacher, teacher_base)
    if folder is None:
        spec = read_student(student or SHIPPED_STUDENT)
        spec.check_steps(steps or 1)
        check_decoder_choice(decoder, spec)
        note(f"loading {spec.name}")  # before PyTorch, whose import takes seconds
    else:
        note(f"loading {teacher}")
        guided = teacher_guidance(folder, guidance, skip_layers, skip_scale)

    from functools import partial

    from distill.evaluate.base import Generate
    from distill.evaluate.generate import generate_images
    from distill.evaluate.sampler import Sampling, StudentModel, TeacherSampler, student_sampler
    from distill.models.device import resolve_device

    where = resolve_device(device)
    if folder is not None:
        sampler = TeacherSampler(folder, where)
        generate_batch: Generate = partial(sampler.generate, Sampling(steps or TEACHER_STEPS, guided))
        truncated = sampler.truncated
    else:
        pipeline = StudentModel(student or SHIPPED_STUDENT, decoder_choice(decoder)).load(where)
        generate_batch, truncated = student_sampler(pipeline, steps or 1), pipeline.truncated
    with image_bar("images", len(texts)) as bar:
        for done in generate_images(generate_batch, texts, seed, batch, out, grid):
            bar.update(done)
    cut = sum(truncated(list(dict.fromkeys(texts))))  # prompts repeat if there are more images
    if cut:
        typer.echo(f"{cut} prompts are longer than the token limit and were cut.")
    typer.echo(f"The images are in {out}." if grid is None else f"The images are in {out}, the grid is {grid}.")
