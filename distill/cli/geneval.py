"""`distill geneval`: generate the images that GenEval scores."""

from functools import partial
from pathlib import Path
from typing import Annotated, cast

import typer

from distill.cli.options import (
    LAST_SEED,
    TEACHER,
    TEACHER_STEPS,
    Device,
    Guidance,
    SkipLayers,
    SkipScale,
    TeacherBase,
    open_given_teacher,
    teacher_guidance,
)


def geneval(
    prompts: Annotated[Path, typer.Argument(help="GenEval's evaluation_metadata.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.", file_okay=False)],
    student: Annotated[Path | None, typer.Option(help="Student folder.")] = None,
    teacher: Annotated[str | None, typer.Option(help=f"Instead of a student: {TEACHER}")] = None,
    teacher_base: TeacherBase = None,
    images: Annotated[int, typer.Option(help="Images per prompt.", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="Sampling steps of a teacher.", min=1)] = TEACHER_STEPS,
    guidance: Guidance = None,
    skip_layers: SkipLayers = "",
    skip_scale: SkipScale = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; seeds count up.", min=0, max=LAST_SEED)] = 0,
    batch: Annotated[int, typer.Option(help="Batch size.", min=1)] = 16,
    device: Device = "auto",
) -> None:
    """Generate images of GenEval's prompts, with a student or a teacher, in the folders that GenEval's scorer reads.

    Run the same command again to resume, also with more images per prompt.
    """
    from distill.errors import ConfigError
    from distill.student.spec import read_student

    if (student is None) == (teacher is None):
        raise ConfigError("give either --student or --teacher")
    if student is not None:
        read_student(student)
    folder = open_given_teacher(teacher, teacher_base)

    from distill.cli.console import image_bar
    from distill.evaluate.geneval import generate_geneval_images, read_geneval_prompts
    from distill.evaluate.sampler import Sampling, TeacherSampler, student_sampler
    from distill.methods.policies import TeacherGuidance
    from distill.models.device import resolve_device
    from distill.pipeline import OneStepPipeline

    metadata = read_geneval_prompts(prompts)
    where = resolve_device(device)
    if folder is None:
        pipeline = OneStepPipeline.load(cast(Path, student), where)
        generate, digest = student_sampler(pipeline), pipeline.spec.digest
        sampling = Sampling(1, TeacherGuidance(scale=1))
    else:
        sampling = Sampling(steps, teacher_guidance(folder, guidance, skip_layers, skip_scale))
        sampler = TeacherSampler(folder, where)
        generate, digest = partial(sampler.generate, sampling), sampler.folder.digest
    settings = {"model": digest, **sampling.as_dict()}
    with image_bar("images", images * len(metadata)) as bar:
        for done in generate_geneval_images(metadata, generate, settings, images, seed, batch, out):
            bar.update(done)
    typer.echo(f"The images are in {out}; GenEval's evaluation/evaluate_images.py scores that folder.")
