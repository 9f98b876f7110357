"""`distill evaluate`: measure the images of a student beside its teacher's."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distill.cli.options import (
    LAST_SEED,
    MOST,
    TEACHER,
    TEACHER_STEPS,
    Decoders,
    Device,
    Guidance,
    SkipLayers,
    SkipScale,
    TeacherBase,
    check_decoder_choice,
    decoder_choice,
    teacher_guidance,
)

if TYPE_CHECKING:
    import torch

    from distill.evaluate.sampler import Sampling, StudentModel
    from distill.models.sd3_folder import SD3Folder
    from distill.student.spec import OneStepSpec


def evaluate(
    student: Annotated[Path | None, typer.Option(help="Student folder. Default: the shipped student.")] = None,
    teacher: Annotated[str, typer.Option(help=f"Teacher: {TEACHER}")] = "scenes",
    teacher_base: TeacherBase = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Compare with the teacher's images of the prompts in this file.", dir_okay=False)
    ] = None,
    images: Annotated[int, typer.Option(help="With --prompts: number of images.", min=2, max=MOST)] = 256,
    clip: Annotated[str | None, typer.Option(help="With --prompts: folder or hub id of a CLIP model.")] = None,
    references: Annotated[
        Path, typer.Option(help="With --prompts: folder that keeps the teacher's images.", file_okay=False)
    ] = Path("runs/references"),
    per_task: Annotated[int, typer.Option(help="Without --prompts: prompts per task of the toy dataset.", min=1)] = 128,
    split: Annotated[
        Literal["held-out", "seen", "both"],
        typer.Option(help="Without --prompts: held-out combinations, those of training, or both."),
    ] = "held-out",
    steps: Annotated[int, typer.Option(help="Sampling steps of the teacher.", min=1)] = TEACHER_STEPS,
    guidance: Guidance = None,
    skip_layers: SkipLayers = "",
    skip_scale: SkipScale = None,
    teacher_steps: Annotated[
        str, typer.Option(help="Further step counts of the teacher, guided and unguided, such as 1,4,28.")
    ] = "",
    student_steps: Annotated[int, typer.Option(help="Sampling steps of an any-step student.", min=1)] = 1,
    decoder: Decoders = None,
    seed: Annotated[int, typer.Option(help="Without --prompts: seed of prompts and images.", min=0, max=LAST_SEED)] = 0,
    device: Device = "auto",
    picture: Annotated[Path, typer.Option(help="PNG file for a picture of both models.", dir_okay=False)] = Path(
        "runs/teacher-vs-student.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Evaluate teacher and student on the same prompts and seeds.

    With --prompts, the student of any teacher is compared with the teacher's own images. Without it, both are scored on
    the toy dataset: a score is the share of images that are correct by GenEval's rules, distances are to rendered
    scenes, and ± is half of a 95 % interval.
    """
    counts = _step_counts(teacher_steps)

    from distill.config import Prompts
    from distill.data.prompts import read_prompts
    from distill.errors import ConfigError
    from distill.evaluate.datasets import EVAL_DATASETS
    from distill.files import check_replaceable
    from distill.methods.policies import TeacherGuidance
    from distill.models.teacher import open_teacher
    from distill.options import SHIPPED_STUDENT
    from distill.student.spec import read_student
    from distill.training.preflight import check_source

    check_replaceable(picture)
    opened = open_teacher(teacher, teacher_base)
    guided = teacher_guidance(opened, guidance, skip_layers, skip_scale)
    folder = student or SHIPPED_STUDENT
    spec = read_student(folder)
    spec.check_steps(student_steps)
    decoders = list(dict.fromkeys(decoder or ["auto"]))
    for name in decoders:
        check_decoder_choice(name, spec)
    if prompts is not None:
        check_source(Prompts(source=str(prompts)), read_prompts)
    elif clip is not None:
        raise ConfigError("--clip is given without --prompts; give the file of prompts that are scored")
    elif "scenes" not in EVAL_DATASETS:
        raise ConfigError("distill evaluate needs the toy dataset; reinstall distill with its folder distill/worlds")

    from distill.evaluate.sampler import Sampling, StudentModel
    from distill.models.device import resolve_device

    others = [Sampling(count, each) for count in counts for each in (guided, TeacherGuidance(scale=1))]
    models = _Models(
        teacher=opened,
        samplings=list(dict.fromkeys([Sampling(steps, guided), *others])),
        student=spec,
        students={
            "student" if name == decoders[0] else f"student, decoder {name}": StudentModel(folder, decoder_choice(name))
            for name in decoders
        },
        student_steps=student_steps,
        device=resolve_device(device),
    )
    if prompts is None:
        splits = ("held-out", "seen") if split == "both" else (split,)
        _score_on_toy_dataset(models, splits, per_task, seed, picture, as_json)
    else:
        _compare_with_teacher(models, prompts, images, clip, references, picture, as_json)


def _step_counts(text: str) -> list[int]:
    """The value of --teacher-steps. Raises BadParameter for anything but positive integers."""
    counts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(count.isdecimal() and int(count) for count in counts):
        raise typer.BadParameter(f"{text!r} is not a list of step counts such as 1,4,28")
    return list(map(int, counts))


@dataclass(frozen=True)
class _Models:
    """What is evaluated: a teacher's samplings, the first of which the others are compared with, and a student.

    `students` is the student with each of its decoders.
    """

    teacher: "SD3Folder"
    samplings: "list[Sampling]"
    student: "OneStepSpec"
    students: "dict[str, StudentModel]"
    student_steps: int
    device: "torch.device"


def _score_on_toy_dataset(
    models: _Models, splits: Sequence[str], per_task: int, seed: int, picture: Path, as_json: bool
) -> None:
    """Score all models on prompts of each split, and show the results; the picture is of the first split."""
    from distill.cli.console import image_bar, metric_table, out, table
    from distill.evaluate.base import FEATURES
    from distill.evaluate.dataset_comparison import DatasetComparer, ratio_table
    from distill.evaluate.datasets import EVAL_DATASETS
    from distill.report.grid import save_png

    dataset = EVAL_DATASETS["scenes"]()
    comparison = DatasetComparer(
        models.teacher, models.students, models.samplings, dataset, models.device, models.student_steps
    )
    drawn = {name: dataset.prompts(per_task, seed, name == "held-out") for name in splits}
    with image_bar("images", sum(map(comparison.count, drawn.values()))) as bar:
        results = {name: comparison.run(prompts, seed, bar.advance) for name, prompts in drawn.items()}
    first, *rest = results
    drawing = results[first].picture()
    if as_json:
        values = {"split": first, **results[first].as_dict(), **{name: results[name].as_dict() for name in rest}}
        typer.echo(json.dumps(values, indent=2))
        save_png(drawing, picture)
        return
    for name, result in results.items():
        for model, (measured, _) in result.students.items():
            header = ("", "teacher", model, "student / teacher")
            out.print(table(f"{name} prompts", header, ratio_table(result.teacher, measured)))
        if len(models.samplings) > 1:
            out.print(metric_table(f"{name} prompts", *result.overview()))
    out.print(f"± is half of a 95 % interval over prompts; features: {FEATURES}.")
    save_png(drawing, picture)
    out.print(f"The picture is {picture}.")


def _compare_with_teacher(
    models: _Models, prompts: Path, images: int, clip: str | None, kept_in: Path, picture: Path, as_json: bool
) -> None:
    """Compare all models with the teacher's images of the prompts in a file, and show the results.

    The teacher's images are kept in a folder. The picture is of the largest differences.
    """
    from distill.cli.console import image_bar, out, table
    from distill.data.prompts import DistinctPrompts, read_prompts
    from distill.evaluate.clip import Clip
    from distill.evaluate.evaluator_comparison import compare_by_evaluator
    from distill.evaluate.reference_evaluator import FEATURES, ReferenceEvaluator
    from distill.evaluate.references import References
    from distill.evaluate.sampler import TeacherSampler
    from distill.report.grid import save_png

    teacher, device, (reference, *others) = models.teacher, models.device, models.samplings
    texts = list(islice(DistinctPrompts(read_prompts(str(prompts))), images))
    references = References(kept_in, teacher, reference, models.student.sizes[0], texts, images)
    scorer = None if clip is None else Clip(clip, device)

    @cache
    def load_sampler() -> TeacherSampler:
        return TeacherSampler(teacher, device, references.texts, references.folder)

    with image_bar("teacher's images", len(references.texts)) as bar:
        for progress in references.make(device, load_sampler if others else None):
            bar.update(progress.images)
    evaluator = ReferenceEvaluator(references, scorer)
    shape = teacher.latent_shape_of(*references.size)
    sampled = {f"teacher, {each.name}": partial(load_sampler().generate, each, shape=shape) for each in others}
    with image_bar("images", (len(models.students) + len(others)) * evaluator.count) as bar:
        found = compare_by_evaluator(
            evaluator, teacher, models.students, references.size, device, bar.advance, models.student_steps, sampled
        )
    assert found.picture is not None
    if as_json:
        typer.echo(json.dumps({"features": FEATURES, **found.as_dict()}, indent=2))
        save_png(found.picture, picture)
        return
    out.print(table(f"{models.student.name} and the teacher's images, {reference.name}", *found.table()))
    out.print(f"{images} images of {len(texts)} prompts; features: {FEATURES}.")
    save_png(found.picture, picture)
    out.print(f"The picture of the largest differences is {picture}.")
