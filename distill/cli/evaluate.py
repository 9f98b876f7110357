"""`distill evaluate`, `geneval` and `score`: measure the quality of a model's images."""

import json
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

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
    open_given_teacher,
    teacher_guidance,
)

if TYPE_CHECKING:
    import torch

    from distill.evaluate.clip import Clip
    from distill.evaluate.references import References
    from distill.evaluate.sampler import Sampling, StudentModel
    from distill.evaluate.student_comparison import StudentComparison


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
    counts = [part for part in teacher_steps.split(",") if part.strip()]
    if not all(part.strip().isdecimal() and int(part) for part in counts):
        raise typer.BadParameter(f"{teacher_steps!r} is not a list of step counts such as 1,4,28")

    from distill.data.prompts import read_prompts
    from distill.data.sources import EVAL_DATASETS
    from distill.errors import ConfigError
    from distill.files import check_replaceable
    from distill.methods.policies import TeacherGuidance
    from distill.models.teacher import open_teacher
    from distill.options import SHIPPED_STUDENT
    from distill.student.spec import read_student

    check_replaceable(picture)
    folder = open_teacher(teacher, teacher_base)
    guided = teacher_guidance(folder, guidance, skip_layers, skip_scale)
    spec = read_student(student or SHIPPED_STUDENT)
    spec.check_steps(student_steps)
    choices = list(dict.fromkeys(decoder or ["auto"]))
    for name in choices:
        check_decoder_choice(name, spec)
    if prompts is None and clip is not None:
        raise ConfigError("--clip is given without --prompts; give the file of prompts that are scored")
    if prompts is None and "scenes" not in EVAL_DATASETS:
        raise ConfigError("distill evaluate needs the toy dataset; reinstall distill with its folder distill/worlds")
    if prompts is not None:
        next(read_prompts(str(prompts)), None)

    from distill.cli.console import image_bar, metric_table, out, table
    from distill.evaluate.base import FEATURES
    from distill.evaluate.reference_evaluator import FEATURES as REFERENCE_FEATURES
    from distill.evaluate.sampler import Sampling, StudentModel
    from distill.evaluate.side_by_side import Comparison, ratio_table
    from distill.models.device import resolve_device
    from distill.report.grid import save_png

    others = [Sampling(int(count), each) for count in counts for each in (guided, TeacherGuidance(scale=1))]
    samplings = list(dict.fromkeys([Sampling(steps, guided), *others]))
    where = resolve_device(device)
    students = {
        "student" if i == 0 else f"student, decoder {name}": StudentModel(
            student or SHIPPED_STUDENT, decoder_choice(name)
        )
        for i, name in enumerate(choices)
    }
    if prompts is not None:
        from distill.data.prompts import DistinctPrompts
        from distill.evaluate.clip import Clip
        from distill.evaluate.references import References

        texts = list(islice(DistinctPrompts(read_prompts(str(prompts))), images))
        made = References(references, folder, samplings[0], spec.sizes[0], texts, images)
        scorer = None if clip is None else Clip(clip, where)
        found = _compare_with_teacher(students, made, scorer, samplings[1:], student_steps, where)
        assert found.picture is not None
        save_png(found.picture, picture)
        if as_json:
            typer.echo(json.dumps({"features": REFERENCE_FEATURES, **found.as_dict()}, indent=2))
            return
        out.print(table(f"{spec.name} and the teacher's images, {samplings[0].name}", *found.table()))
        out.print(f"{images} images of {len(texts)} prompts; features: {REFERENCE_FEATURES}.")
        out.print(f"The picture of the largest differences is {picture}.")
        return
    dataset = EVAL_DATASETS["scenes"]()
    comparison = Comparison(folder, students, samplings, dataset, where, student_steps)
    splits = ("held-out", "seen") if split == "both" else (split,)
    drawn = {name: dataset.prompts(per_task, seed, name == "held-out") for name in splits}
    with image_bar("images", sum(map(comparison.count, drawn.values()))) as bar:
        results = {name: comparison.run(each, seed, bar.advance) for name, each in drawn.items()}
    first = results[splits[0]]
    save_png(first.picture(), picture)
    if as_json:
        values = {"split": splits[0], **first.as_dict()}
        if split == "both":
            values["seen"] = results["seen"].as_dict()
        typer.echo(json.dumps(values, indent=2))
        return
    for name, result in results.items():
        for model, (measured, _) in result.students.items():
            header = ("", "teacher", model, "student / teacher")
            out.print(table(f"{name} prompts", header, ratio_table(result.teacher, measured)))
        if counts:
            out.print(metric_table(f"{name} prompts", *result.overview()))
    out.print(f"± is half of a 95 % interval over prompts; features: {FEATURES}.")
    out.print(f"The picture is {picture}.")


def _compare_with_teacher(
    students: "dict[str, StudentModel]",
    references: "References",
    clip: "Clip | None",
    others: "list[Sampling]",
    student_steps: int,
    device: "torch.device",
) -> "StudentComparison":
    """Make the teacher's images, and compare students and other samplings of the teacher with them."""
    from distill.cli.console import image_bar
    from distill.evaluate.reference_evaluator import ReferenceEvaluator
    from distill.evaluate.sampler import TeacherSampler
    from distill.evaluate.student_comparison import compare_students

    teacher = references.teacher
    with image_bar("teacher's images", len(references.texts)) as bar:
        for progress in references.make(device):
            bar.update(progress.images)
    evaluator = ReferenceEvaluator(references, clip)
    sampled = {}
    if others:
        sampler = TeacherSampler(teacher, device, references.texts)
        shape = teacher.latent_shape_of(*references.size)
        sampled = {f"teacher, {each.name}": partial(sampler.generate, each, shape=shape) for each in others}
    with image_bar("images", (len(students) + len(others)) * evaluator.count) as bar:
        return compare_students(
            evaluator, teacher, students, references.size, device, bar.advance, student_steps, sampled
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


def score(
    folder: Annotated[Path, typer.Argument(help="Folder of images from `distill generate` or `distill geneval`.")],
    clip: Annotated[str | None, typer.Option(help="Folder or hub id of a CLIP model, for CLIP score and CMMD.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of real images, for CMMD and FID.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Inception weights in safetensors, for FID.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compute CLIP score, CMMD and FID of a folder of images, with models that you provide."""
    from distill.errors import ConfigError

    if clip is None and inception is None:
        raise ConfigError("no model is given; give --clip, or --inception with --reference")
    if inception is not None and reference is None:
        raise ConfigError("FID compares with real images; give their folder with --reference")
    from distill.evaluate.image_folder import find_images

    for images in (folder, reference):
        if images is not None:
            find_images(images)
    if inception is not None and not inception.is_file():
        raise ConfigError(f"--inception {inception} is no file; give weights in safetensors")

    from distill.cli.console import out, table
    from distill.evaluate.image_metrics import score_images
    from distill.models.device import resolve_device

    metrics = score_images(folder, clip, reference, inception, resolve_device(device))
    if as_json:
        typer.echo(json.dumps(metrics, indent=2))
        return
    out.print(table(str(folder), ("", ""), [(name, _format(value)) for name, value in metrics.items()]))


def _format(value: object) -> str:
    """Format a value of a table: a name, a number, or an interval."""
    if isinstance(value, tuple):
        return " to ".join(map(_format, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
