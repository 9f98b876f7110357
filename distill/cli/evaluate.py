"""`distill evaluate`, `geneval` and `score`: how good the images of a model are."""

import json
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from distill.cli.options import LAST_SEED, Device, Guidance


def evaluate(
    student: Annotated[Path | None, typer.Option(help="Student folder; the shipped one if not given.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Teacher folder; the shipped one if not given.")] = None,
    per_task: Annotated[int, typer.Option(help="Prompts of each of the six tasks.", min=1)] = 128,
    split: Annotated[
        Literal["held-out", "seen", "both"], typer.Option(help="Combinations that training never sees, sees, or both.")
    ] = "held-out",
    steps: Annotated[int, typer.Option(help="Steps of the teacher.", min=1)] = 28,
    guidance: Guidance = None,
    teacher_steps: Annotated[
        str, typer.Option(help="More teachers: steps with commas between, each with guidance and without: 1,4,28.")
    ] = "",
    student_steps: Annotated[int, typer.Option(help="Steps of a flow map student.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of prompts and images.", min=0, max=LAST_SEED)] = 0,
    device: Device = "auto",
    picture: Annotated[Path, typer.Option(help="Where the picture goes.", dir_okay=False)] = Path(
        "runs/teacher-vs-student.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Evaluate teacher and student on the same prompts and seeds of the toy dataset.

    Scores are the share of images that are correct by GenEval's rules; distances are to true scenes. ± is
    half of a 95 % interval.
    """
    counts = [part for part in teacher_steps.split(",") if part.strip()]
    if not all(part.strip().isdecimal() and int(part) for part in counts):
        raise typer.BadParameter(f"{teacher_steps!r} is not numbers of steps with commas between, as in 1,4,28")

    from distill.cli.console import image_bar, out, table
    from distill.evaluate.base import FEATURES
    from distill.evaluate.side_by_side import SHIPPED_TEACHER, Comparison, overview, side_by_side
    from distill.files import check_replaceable
    from distill.models.device import resolve_device
    from distill.models.sd3_folder import SD3Folder
    from distill.pipeline import SHIPPED_STUDENT
    from distill.report.picture import save_png
    from distill.worlds.scenes.evaluator import SceneEvaluator

    check_replaceable(picture)
    settings = [(steps, guidance), *((int(count), scale) for count in counts for scale in (guidance, 1.0))]
    folder = student or SHIPPED_STUDENT
    students, where = {"student": folder}, resolve_device(device)
    comparison = Comparison(SD3Folder.read(teacher or SHIPPED_TEACHER), students, settings, where, student_steps)
    asked = {
        name: SceneEvaluator().prompts(per_task, seed, name == "held-out")
        for name in (("held-out", "seen") if split == "both" else (split,))
    }
    with image_bar("images", sum(map(comparison.count, asked.values()))) as bar:
        results = {name: comparison.run(questions, seed, bar.advance) for name, questions in asked.items()}
    first = next(iter(results.values()))
    save_png(first.picture(), picture)
    if as_json:
        values = {"split": next(iter(results)), **first.as_dict()}
        if split == "both":
            values["seen"] = results["seen"].as_dict()
        typer.echo(json.dumps(values, indent=2))
        return
    for name, result in results.items():
        rows = side_by_side(result.teacher, result.students["student"].result)
        out.print(table(f"{name} prompts", ("", "teacher", "student", "student / teacher"), rows))
        if counts:
            out.print(table(f"{name} prompts", *overview(result.models())))
    out.print(f"± is half of a 95 % interval over prompts; features: {FEATURES}.")
    out.print(f"The picture is {picture}.")


def geneval(
    prompts: Annotated[Path, typer.Argument(help="GenEval's evaluation_metadata.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder of the images, for GenEval's scorer.", file_okay=False)],
    student: Annotated[Path | None, typer.Option(help="Student folder.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Teacher folder, in place of a student.")] = None,
    images: Annotated[int, typer.Option(help="Images of each prompt.", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="Steps of a teacher.", min=1)] = 28,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; it counts up.", min=0, max=LAST_SEED)] = 0,
    batch: Annotated[int, typer.Option(help="Images made together.", min=1)] = 16,
    device: Device = "auto",
) -> None:
    """Render GenEval's prompts in the folders that its scorer reads, with a student or a teacher.

    The same command continues one that was stopped; more images can be asked for later.
    """
    from functools import partial

    from distill.cli.console import image_bar
    from distill.errors import ConfigError
    from distill.evaluate.geneval import read_questions, render
    from distill.evaluate.sampler import Setting, TeacherSampler, student_sampler
    from distill.models.device import resolve_device
    from distill.models.sd3_folder import SD3Folder
    from distill.pipeline import OneStepPipeline

    if (student is None) == (teacher is None):
        raise ConfigError("give either --student or --teacher, the folder of the model that makes the images")
    questions = read_questions(prompts)
    where = resolve_device(device)
    if student is not None:
        pipeline = OneStepPipeline.load(student, where)
        generate, digest, setting = student_sampler(pipeline), pipeline.spec.digest, Setting(1, 1)
    else:
        sampler = TeacherSampler(SD3Folder.read(cast(Path, teacher)), where)
        setting = Setting(steps, sampler.folder.guidance if guidance is None else guidance)
        generate, digest = partial(sampler.generate, setting), sampler.folder.digest
    made_with = {"model": digest, "steps": setting.steps, "guidance": setting.guidance}
    with image_bar("images", images * len(questions)) as bar:
        for done in render(questions, generate, made_with, images, seed, batch, out):
            bar.update(done)
    typer.echo(f"The images are in {out}; GenEval's evaluation/evaluate_images.py scores that folder.")


def score(
    folder: Annotated[Path, typer.Argument(help="Folder of images, as `distill generate` or `geneval` left it.")],
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model: CLIP score, and CMMD if compared.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of real images: CMMD and FID are to them.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Inception weights in safetensors: FID.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Take CLIP score, CMMD and FID of a folder of images, with models that are given by path."""
    from distill.errors import ConfigError

    if clip is None and inception is None:
        raise ConfigError("there is nothing to score with; give --clip, or --inception with --reference")
    if inception is not None and reference is None:
        raise ConfigError("FID is a distance to real images; give their folder with --reference")

    from distill.cli.console import out, table
    from distill.evaluate.images import score_images
    from distill.models.device import resolve_device

    metrics = score_images(folder, clip, reference, inception, resolve_device(device))
    if as_json:
        typer.echo(json.dumps(metrics, indent=2))
        return
    out.print(table(str(folder), ("", ""), [(name, _shown(value)) for name, value in metrics.items()]))


def _shown(value: object) -> str:
    """A figure of a table: a name, a number, or an interval."""
    if isinstance(value, tuple):
        return " to ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
