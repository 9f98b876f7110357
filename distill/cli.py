"""The `distill` command: parse, call, print. No command imports torch before it runs."""

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from distill.errors import ClaimedError, DistillError

if TYPE_CHECKING:
    import torch

    from distill.config import Run
    from distill.remote import Server as Remote

# The libraries' own bars and notices would run through ours.
for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

app = typer.Typer(
    help="Distil a Stable Diffusion 3 type teacher into a one-step student.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
scenes = typer.Typer(help="The small world that ships with the project.", no_args_is_help=True)
app.add_typer(scenes, name="scenes")
prompts = typer.Typer(help="Look at prompts before they are encoded.", no_args_is_help=True)
app.add_typer(prompts, name="prompts")
cifar10 = typer.Typer(help="CIFAR-10 in pixels, from its own binary files.", no_args_is_help=True)
app.add_typer(cifar10, name="cifar10")

SHOWN = ("gap", "flow_matching", "regression", "residual", "overall", "frechet", "diversity")  # figures beside a bar

_IMAGES = (
    "Folder of images, each with a .txt caption beside it or all in metadata.jsonl; folder of WebDataset .tar shards, "
    "or one of them; or `scenes`."
)
_SOURCE = "txt, jsonl, csv or parquet file, folder of a saved data set, `scenes`, or - for stdin."


@app.command()
def teacher(
    out: Annotated[Path, typer.Option(help="Folder of the teacher and of its training state.")] = Path("runs/teacher"),
    vae_images: Annotated[int, typer.Option(help="Images that the autoencoder is trained on.")] = 26_000,
    images: Annotated[int, typer.Option(help="Images that the transformer is trained on.")] = 1_600_000,
    coarse_images: Annotated[int, typer.Option(help="How many of them, the first, on large patches.")] = 660_000,
    scenes: Annotated[int, typer.Option(help="Different scenes among them.")] = 40_960,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the transformer first.")] = False,
) -> None:
    """Train the small world's teacher from nothing, in Stable Diffusion 3's own format.

    First the autoencoder, then the transformer with its text encoders. The same command continues a run that was
    stopped, larger budgets continue a finished one; Ctrl-C stops it at the end of a step and keeps what was learnt.
    """
    from distill.checkpoint import claimed
    from distill.console import image_bar
    from distill.device import resolve_device
    from distill.scenes.train import TeacherRecipe, train_teacher
    from distill.scenes.vae import VaeRecipe, train_vae

    where = resolve_device(device)
    recipe = TeacherRecipe(images=images, coarse_images=coarse_images, scenes=scenes, seed=seed + 1)
    stages = [
        ("autoencoder", train_vae(VaeRecipe(images=vae_images, seed=seed), out, where)),
        ("teacher", train_teacher(recipe, out, where, compiled)),
    ]
    with claimed(out), _asked_to_stop() as asked:
        for name, training in stages:
            with image_bar(name, vae_images if name == "autoencoder" else images) as bar:
                for progress in training:
                    bar.update(progress.images, progress.figures)
                    if asked:
                        progress.save()
                        raise _stopped(progress.images, asked)
    typer.echo(f"The teacher is in {out}; `distill evaluate --teacher {out}` judges it.")


@app.command()
def run(
    config: Annotated[
        str, typer.Argument(help="A preset (scenes-debug, scenes, sd3-medium-lora, ...) or a YAML file.")
    ],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, for example images=50000.")] = None,
    method: Annotated[str | None, typer.Option(help="A method in place of the preset's: fgm, dmd, ...")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Budget in seconds of training; a measured speed makes images of it.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<preset> if not given.")] = None,
) -> None:
    """Distil a teacher into a one-step student.

    The same command continues a run that was stopped, killed or given a larger budget; Ctrl-C stops it at the end of
    a step and keeps what was learnt (status 130; 143 after SIGTERM; 75 while another process writes to the folder).
    Under `accelerate launch -m distill.cli run ...` it uses every process.
    """
    import yaml

    from distill.config import load_config, replace_method

    resolved = load_config(config, [*(replace_method(config, method) if method else []), *(overrides or [])])
    folder = out or Path("runs") / Path(config).stem

    if _distil(resolved, folder, yaml.safe_dump(resolved.as_dict(), sort_keys=False), seconds):
        typer.echo(
            f"The student is in {folder / 'student'}; `fgm-service serve --model {folder / 'student'}` serves it."
        )


def _distil(config: "Run", folder: Path, heading: str, seconds: float | None = None) -> bool:
    """One run to its end, with bars; False in all processes but the first. Ends the command when asked to stop.

    `seconds` of training are a budget in place of the configuration's images.
    """
    from distill import console
    from distill import run as runs
    from distill.checkpoint import claimed
    from distill.console import image_bar
    from distill.speed import images_within

    machine = runs.accelerator(config, folder)
    console.quiet(not machine.is_main_process)
    with claimed(folder) if machine.is_main_process else nullcontext():
        if machine.is_main_process:
            runs.prepare(config, folder)
            typer.echo(heading)
            _encode(config, folder, machine.device)
        machine.wait_for_everyone()
        if seconds is not None:
            config = config.model_copy(update={"images": images_within(seconds, config, folder)})
            if machine.is_main_process:
                runs.prepare(config, folder)
        with image_bar("distilling", config.images) as bar, _asked_to_stop() as asked:
            for progress in runs.distil(config, folder, machine):
                figures = {name: progress.figures[name] for name in SHOWN if name in progress.figures}
                bar.update(progress.images, figures)
                for note in progress.notes:
                    bar.say(note)
                if asked and machine.is_main_process:
                    progress.save()
                    raise _stopped(progress.images, asked)
        machine.end_training()
    return bool(machine.is_main_process)


def _encode(config: "Run", folder: Path, device: "torch.device") -> None:
    """A run's prompts, and its real images if it takes any, with bars, unless they are encoded already."""
    from distill import run as runs
    from distill.console import image_bar

    with image_bar("prompts", config.prompts.count) as bar:
        for encoded in runs.embed(config, folder, device):
            bar.update(encoded.prompts, {"truncated": encoded.truncated})
    if config.real is not None:
        with image_bar("real images", config.real.count) as bar:
            for images in runs.encode(config, folder, device):
                bar.update(images.images, {"skipped": images.skipped})


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder: finished, stopped or running.")],
    out: Annotated[Path | None, typer.Option(help="Student folder; student in the run folder if not given.")] = None,
    checkpoint: Annotated[
        str, typer.Option(help="best, last, or the images seen of a checkpoint; best is the last if none was judged.")
    ] = "best",
    dtype: Annotated[Literal["fp16", "bf16", "fp32"], typer.Option(help="Precision of the transformer.")] = "fp16",
    max_shard_size: Annotated[str, typer.Option(help="Size of one file of weights at most: 5GB, 500MB.")] = "5GB",
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence of the card; what the teacher's says if not given.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with stock diffusers; differing is an error.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where --check computes: cpu, cuda, cuda:1, auto.")] = "auto",
) -> None:
    """Write the student of a run, as `distill run` does at its end.

    The student is the averaged one of a checkpoint; a LoRA run's folder also holds the adapter, for diffusers and
    ComfyUI. An older student in the same place is replaced by a whole one.
    """
    import torch

    from distill.device import resolve_device
    from distill.parity import TOLERANCE, check_parity
    from distill.run import export as export_run

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    folder = export_run(run, out, checkpoint, kind, max_shard_size, licence)
    seen = json.loads((folder / "onestep.json").read_text())["images_seen"]
    typer.echo(f"The student after {seen} images is in {folder}.")
    if check:
        largest = check_parity(folder, resolve_device(device))
        typer.echo(
            f"Stock diffusers makes the same latents: they differ by {largest:.1e} at most, {TOLERANCE:g} is allowed."
        )


def _stopped(images: int, asked: list[int]) -> typer.Exit:
    """Say so, and with which status the command ends."""
    typer.echo(f"Stopped after {images} images, which are saved; the same command continues.")
    return typer.Exit(128 + asked[0])


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM is noted, so that a step can end and be saved; the second ends at once."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def embed(
    teacher: Annotated[Path, typer.Argument(help="Teacher folder.")],
    prompts: Annotated[str, typer.Argument(help=_SOURCE)],
    out: Annotated[Path, typer.Option(help="Folder of the cache.")],
    count: Annotated[int | None, typer.Option(help="Prompts to take at most.")] = None,
    shard_rows: Annotated[int, typer.Option(help="Prompts of one file at most; it stays under 1 GiB.", min=1)] = 4096,
    processes: Annotated[
        int, typer.Option(help="Processes with encoders of their own; with cuda they take the GPUs in turn.", min=1)
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
) -> None:
    """Encode prompts once, so that training holds no text encoder.

    A repeated prompt is encoded once. The same command continues one that was stopped or killed: files that are
    whole are kept, if the source still begins with the prompts that they hold.
    """
    from distill.checkpoint import claimed
    from distill.console import image_bar
    from distill.device import resolve_device
    from distill.embed import embed_prompts
    from distill.prompts import read_prompts

    encoded = None
    where = resolve_device(device)
    with claimed(out), image_bar("prompts", count) as bar:
        for encoded in embed_prompts(teacher, read_prompts(prompts, count), out, where, shard_rows, processes):
            bar.update(encoded.prompts + encoded.repeated, {"truncated": encoded.truncated})
    assert encoded is not None  # a source without prompts is an error
    if encoded.truncated:
        typer.echo(f"{encoded.truncated} prompts are over the token limit; the model sees their beginnings.")
    repeated = f"; {encoded.repeated} more were repetitions of them" if encoded.repeated else ""
    typer.echo(f"The embeddings of {encoded.prompts} prompts are in {out}{repeated}.")


@app.command()
def encode(
    teacher: Annotated[Path, typer.Argument(help="Teacher folder.")],
    images: Annotated[str, typer.Argument(help=_IMAGES)],
    out: Annotated[Path, typer.Option(help="Folder of the cache.")],
    count: Annotated[int | None, typer.Option(help="Images to take at most.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of `scenes`.", min=0)] = 0,
    shard_rows: Annotated[int, typer.Option(help="Images of one file at most; it stays under 1 GiB.", min=1)] = 4096,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
) -> None:
    """Encode real images and their captions once, for methods that learn from them too: RealUID, DMD2's GAN.

    Images are scaled and cut to the teacher's native size. One that cannot be used is passed over and named in
    skipped.jsonl; more than 10 that are more than 1 in 100 end the command. The same command continues one that was
    stopped or killed: files that are whole are kept, if the source still begins with the images that they hold.
    """
    from distill.checkpoint import claimed
    from distill.console import image_bar
    from distill.device import resolve_device
    from distill.images import SKIPPED, encode_examples, read_examples

    encoded = None
    where = resolve_device(device)
    with claimed(out), image_bar("images", count) as bar:
        for encoded in encode_examples(teacher, read_examples(images, count, seed), out, where, shard_rows):
            bar.update(encoded.images, {"skipped": encoded.skipped})
    assert encoded is not None  # a source without images is an error
    if encoded.truncated:
        typer.echo(f"{encoded.truncated} captions are over the token limit; the model sees their beginnings.")
    if encoded.skipped:
        typer.echo(f"{encoded.skipped} images could not be used; {out / SKIPPED} names them.")
    typer.echo(f"The latents of {encoded.images} images are in {out}; real.source={out} in a run takes them.")


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.", metavar="PROMPT")] = None,
    file: Annotated[str | None, typer.Option(help=f"More prompts: {_SOURCE}")] = None,
    student: Annotated[Path | None, typer.Option(help="Student folder; the shipped one if not given.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Teacher folder, in place of a student.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the images.")] = Path("runs/images"),
    count: Annotated[
        int | None, typer.Option(help="Images to make, going round the prompts; one of each if not given.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; it counts up.", min=0, max=2**63 - 1)] = 0,
    batch: Annotated[int, typer.Option(help="Images made together; it changes none of them.", min=1)] = 16,
    grid: Annotated[Path | None, typer.Option(help="PNG file for the first 64 images with their prompts.")] = None,
    steps: Annotated[
        int, typer.Option(help="Steps of an image; more than 1 for flow map students and teachers.", min=1)
    ] = 1,
    guidance: Annotated[float | None, typer.Option(help="Teacher's scale; what its folder says if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
) -> None:
    """Make an image of each prompt: with a student in one step, or with a teacher in many.

    Files are named by index and seed, and hold prompt and seed as text. An image's prompt with its seed makes it again.
    """
    from functools import partial
    from itertools import cycle, islice

    from distill.console import image_bar
    from distill.device import resolve_device
    from distill.errors import ConfigError, PromptError
    from distill.evaluate.judge import Generate
    from distill.evaluate.sampler import Setting, TeacherSampler, student_sampler
    from distill.generate import generate_images
    from distill.pipeline import SHIPPED_STUDENT, OneStepPipeline
    from distill.prompts import read_prompts

    if student is not None and teacher is not None:
        raise ConfigError("--student and --teacher are both given; one model makes the images")
    texts = [*(prompts or ()), *(read_prompts(file) if file is not None else ())]
    if not texts:
        raise PromptError("there is nothing to make; give prompts, or --file with a source of them")
    texts = list(islice(cycle(texts), count or len(texts)))
    where = resolve_device(device)
    if teacher is not None:
        sampler = TeacherSampler(teacher, where)
        setting = Setting(steps, sampler.spec.guidance if guidance is None else guidance)
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


@app.command()
def evaluate(
    student: Annotated[Path | None, typer.Option(help="Student folder; the shipped one if not given.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Teacher folder; the shipped one if not given.")] = None,
    per_task: Annotated[int, typer.Option(help="Prompts of each of the six tasks.", min=1)] = 128,
    split: Annotated[
        Literal["held-out", "seen", "both"], typer.Option(help="Combinations that training never sees, sees, or both.")
    ] = "held-out",
    steps: Annotated[int, typer.Option(help="Steps of the teacher.", min=1)] = 28,
    guidance: Annotated[float | None, typer.Option(help="Teacher's scale; what its folder says if not given.")] = None,
    teacher_steps: Annotated[
        str, typer.Option(help="More teachers: steps with commas between, each with guidance and without: 1,4,28.")
    ] = "",
    student_steps: Annotated[int, typer.Option(help="Steps of a flow map student.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of prompts and images.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("runs/teacher-vs-student.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Judge teacher and student on the same prompts and seeds of the small world.

    Scores per task are GenEval's verdicts in [0, 1]; distances are to true scenes. ± is half of a 95 % interval.
    """
    counts = [part for part in teacher_steps.split(",") if part.strip()]
    if not all(part.strip().isdecimal() and int(part) for part in counts):
        raise typer.BadParameter(f"{teacher_steps!r} is not numbers of steps with commas between, as in 1,4,28")

    from distill.console import image_bar, out, table
    from distill.device import resolve_device
    from distill.evaluate.compare import SHIPPED_TEACHER, Comparison, overview, side_by_side
    from distill.evaluate.judge import FEATURES, Questions
    from distill.evaluate.picture import save_png
    from distill.pipeline import SHIPPED_STUDENT

    settings = [(steps, guidance), *((int(count), scale) for count in counts for scale in (guidance, 1.0))]
    folder = student or SHIPPED_STUDENT
    students, where = {"student": folder}, resolve_device(device)
    comparison = Comparison(teacher or SHIPPED_TEACHER, students, settings, where, student_steps)
    asked = {
        name: Questions.make(per_task, seed, name == "held-out")
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
        rows = side_by_side(result.teacher, result.students["student"].judgement)
        out.print(table(f"{name} prompts", ("", "teacher", "student", "student / teacher"), rows))
        if counts:
            out.print(table(f"{name} prompts", *overview(result.models())))
    out.print(f"± is half of a 95 % interval over prompts; features: {FEATURES}.")
    out.print(f"The picture is {picture}.")


@app.command()
def geneval(
    prompts: Annotated[Path, typer.Argument(help="GenEval's evaluation_metadata.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder of the images, for GenEval's scorer.")],
    student: Annotated[Path | None, typer.Option(help="Student folder.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Teacher folder, in place of a student.")] = None,
    images: Annotated[int, typer.Option(help="Images of each prompt.", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="Steps of a teacher.", min=1)] = 28,
    guidance: Annotated[float | None, typer.Option(help="Teacher's scale; what its folder says if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; it counts up.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Images made together.", min=1)] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
) -> None:
    """Render GenEval's prompts in the folders that its scorer reads, with a student or a teacher.

    The same command continues one that was stopped; more images can be asked for later.
    """
    from functools import partial

    from distill.console import image_bar
    from distill.device import resolve_device
    from distill.errors import ConfigError
    from distill.evaluate.geneval import read_questions, render
    from distill.evaluate.sampler import Setting, TeacherSampler, student_sampler
    from distill.pipeline import OneStepPipeline

    if (student is None) == (teacher is None):
        raise ConfigError("give either --student or --teacher, the folder of the model that makes the images")
    questions = read_questions(prompts)
    where = resolve_device(device)
    if student is not None:
        pipeline = OneStepPipeline.load(student, where)
        generate, digest, setting = student_sampler(pipeline), pipeline.spec.digest, Setting(1, 1)
    else:
        sampler = TeacherSampler(cast(Path, teacher), where)
        setting = Setting(steps, sampler.spec.guidance if guidance is None else guidance)
        generate, digest = partial(sampler.generate, setting), sampler.spec.digest
    made_with = {"model": digest, "steps": setting.steps, "guidance": setting.guidance}
    with image_bar("images", images * len(questions)) as bar:
        for done in render(questions, generate, made_with, images, seed, batch, out):
            bar.update(done)
    typer.echo(f"The images are in {out}; GenEval's evaluation/evaluate_images.py scores that folder.")


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="Folder of images, as `distill generate` or `geneval` left it.")],
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model: CLIP score, and CMMD if compared.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of real images: CMMD and FID are to them.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Inception weights in safetensors: FID.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Take CLIP score, CMMD and FID of a folder of images, with models that are given by path."""
    from distill.errors import ConfigError

    if clip is None and inception is None:
        raise ConfigError("there is nothing to score with; give --clip, or --inception with --reference")
    if inception is not None and reference is None:
        raise ConfigError("FID is a distance to real images; give their folder with --reference")

    from distill.console import out, table
    from distill.device import resolve_device
    from distill.evaluate.images import score_images

    figures = score_images(folder, clip, reference, inception, resolve_device(device))
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    out.print(table(str(folder), ("", ""), [(name, _shown(value)) for name, value in figures.items()]))


def _shown(value: object) -> str:
    """A figure of a table: a name, a number, or an interval."""
    if isinstance(value, tuple):
        return " to ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@app.command()
def compare(
    variants: Annotated[
        list[str], typer.Argument(help="Methods or YAML files, each with its own keys: fgm,method.alpha=0.5.")
    ],
    config: Annotated[str, typer.Option(help="Preset or YAML file that methods take everything else from.")] = "scenes",
    images: Annotated[int | None, typer.Option(help="Budget of each in images; the preset's.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget of each in seconds of training.", min=1)] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value for all of them.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of what is found.")] = Path("runs/compare"),
    per_task: Annotated[int, typer.Option(help="Held-out prompts of each of the six tasks.", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Steps of the teacher.", min=1)] = 28,
    seed: Annotated[int, typer.Option(help="Seed of prompts and images that are judged.")] = 0,
) -> None:
    """Distil one teacher in several ways with equal images or seconds, and judge the students alike.

    Leaves one run folder each, `compare.json`, `compare.md` and `compare.png`. The same command continues, also with
    more variants; what is finished is not done again. A run that diverges is told of, and the others go on.
    """
    import shlex

    from distill.compare import is_finished, is_scored, judged, read_variants, share_embeddings, within
    from distill.console import image_bar, table
    from distill.console import out as console
    from distill.device import resolve_device
    from distill.errors import ConfigError, DivergedError
    from distill.evaluate.judge import Questions

    if images is not None and seconds is not None:
        raise ConfigError("--images and --seconds are both given; give one, the other follows from it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "distill compare is one process; under accelerate, launch each `distill run` with a folder under --out, "
            "named as the variant, and compare them afterwards"
        )
    words = [*variants, "--config", config, *(part for each in overrides or [] for part in ("--set", each))]
    words += ["--images", str(images)] if images else ["--seconds", f"{seconds:g}"] if seconds else []
    words += ["--per-task", str(per_task), "--steps", str(steps), "--seed", str(seed)]
    where = resolve_device("auto")
    planned = read_variants(variants, config, overrides or [], images)
    share_embeddings(planned, out)
    finished, diverged = [], {}
    for variant in planned:
        try:
            if seconds is not None:
                _encode(variant.config, out / variant.name, where)
                variant = within(seconds, variant, out)
            if not is_finished(variant, out):
                _distil(variant.config, out / variant.name, f"{variant.name}: {variant.config.images} images")
            finished.append(variant)
        except DivergedError as error:
            diverged[variant.name] = str(error)
            typer.echo(f"{variant.name} diverged: {error}")
    if not finished:
        raise DivergedError(f"every run of the comparison diverged; the first: {next(iter(diverged.values()))}")
    questions = Questions.make(per_task, seed)
    total = (1 + len(finished)) * questions.count if is_scored(finished[0].config) else None
    with image_bar("images", total) as bar:
        outcome = judged(finished, out, questions, steps, seed, where, bar.advance, diverged)
    outcome.save(out, {"command": shlex.join(["distill", "compare", *words]), "images": images, "seconds": seconds})
    console.print(table(f"students of {planned[0].config.teacher}", *outcome.table()))
    console.print(f"The table is {out / 'compare.md'}, the picture {out / 'compare.png'}.")


@app.command()
def plan(
    teacher: Annotated[
        str, typer.Argument(help="Teacher folder, or sd3-medium, sd3.5-medium, sd3.5-large.")
    ] = "sd3-medium",
    device_memory: Annotated[float, typer.Option(help="Memory of the device in GiB.", min=0)] = 80,
    mode: Annotated[Literal["lora", "full"], typer.Option(help="Adapters on one base, or three models.")] = "lora",
    batch: Annotated[int, typer.Option(help="Images of one forward; `micro_batch` of a run.", min=1)] = 4,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels; native if not given.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 64,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision of the run.")] = "bf16",
    method: Annotated[str, typer.Option(help="`method.name` of the run, with its own settings as they are.")] = "fgm",
    optimizer: Annotated[Literal["adam", "adam-8bit"], typer.Option(help="`optimizer.kind` of the run.")] = "adam",
    checkpointing: Annotated[bool, typer.Option(help="Compute blocks again in the backward.")] = False,
    reserve: Annotated[float, typer.Option(help="GiB for the driver, libraries and the allocator.", min=0)] = 2,
    tflops: Annotated[
        float | None, typer.Option(help="Peak TFLOP/s; that of an H100 if not given: 989 in bf16, 67 in fp32.", min=0)
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that is reached.", min=0, max=1)] = 0.35,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Predict memory, arithmetic and speed of a distillation, and whether it fits a device.

    Only configuration files are read: the real networks take the real turns on tensors without data.
    """
    from distill.console import out, table
    from distill.plan import GIB, changes_that_fit, read_geometry, setting

    geometry = read_geometry(teacher)
    made = setting(geometry, mode, rank, checkpointing, dtype, batch, size or geometry.image_size, method, optimizer)
    result = made.plan()
    available = int((device_memory - reserve) * GIB)
    fits = result.peak <= available
    changes = [] if fits else changes_that_fit(made, result, available)
    speed = (tflops or {"bf16": 989, "fp32": 67}[dtype]) * 1e12 * utilisation / result.flop_per_image
    if as_json:
        values = {**result.as_dict(), "fits": fits, "changes": changes, "images_per_second": speed}
        typer.echo(json.dumps(values, indent=2))
        return
    rows = [(part, f"{size / GIB:.2f}") for part, size in result.parts().items()]
    rows += [(f"peak: {moment}", f"{size / GIB:.2f}") for moment, size in result.moments.items()]
    out.print(table(f"{geometry.name}, {result.parameters / 1e9:.2f} B parameters", ("", "GiB"), rows))
    out.print(f"{result.flop_per_image / 1e12:.1f} TFLOP an image; about {speed:.2f} images/s on such a device.")
    needs = f"{result.peak / GIB:.1f} GiB and {reserve:g} GiB set aside"
    if fits:
        out.print(f"It fits {device_memory:g} GiB: {needs}.")
    else:
        enough = f"enough alone: {', or '.join(changes)}" if changes else "no single change is enough"
        out.print(f"It does not fit {device_memory:g} GiB: {needs}; {enough}.")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; report.html in the run folder if not given.")] = None,
) -> None:
    """Show a run in one HTML file: its state, curves, samples, evaluations, cost and configuration.

    The file needs nothing beside it. Runs that are going on or were stopped are shown as far as they are.
    """
    from distill.report import write_report
    from distill.runs import read_run

    page = out or run / "report.html"
    write_report(read_run(run), page)
    typer.echo(f"The report is {page}.")


@app.command("runs")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder that the run folders are in.")] = Path("runs"),
) -> None:
    """List runs: images seen of the budget, the best score, alarms, and whether a run is finished."""
    import time

    from rich.markup import escape

    from distill.console import out, table
    from distill.report import si
    from distill.runs import read_runs

    found = read_runs(folder)
    if not found:
        typer.echo(f"There is no run in {folder}; `distill run scenes-debug` makes one in runs.")
        return
    rows = []
    for each in found:
        best = f"{each.best['overall']:.3f}" if "overall" in each.best else "-"
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.changed))
        seen = f"{si(each.images)} / {si(each.budget)}"
        alarms = str(len(each.alarms) or "-")
        rows.append((escape(each.name), escape(str(each.config["teacher"])), seen, best, alarms, changed, each.state))
    out.print(table(str(folder), ("run", "teacher", "images", "score", "alarms", "last change", "state"), rows))


Server = Annotated[str, typer.Option("--server", envvar="DISTILL_SERVER", help="Address of the server.")]
ServerKey = Annotated[
    str | None, typer.Option("--api-key", envvar="DISTILL_API_KEY", help="Key with the scope jobs, if it wants one.")
]
LOOPBACK = "http://127.0.0.1:8000"


@app.command()
def submit(
    prompts: Annotated[Path, typer.Argument(help="Prompts: a txt, jsonl, csv or parquet file.")],
    teacher: Annotated[str, typer.Option(help="Teacher, by the name that the server has for it.")] = "scenes",
    preset: Annotated[str | None, typer.Option(help="Preset; scenes for that teacher if not given.")] = None,
    method: Annotated[str | None, typer.Option(help="A method in place of the preset's: fgm, dmd, ...")] = None,
    images: Annotated[int | None, typer.Option(help="Budget in images; the preset's.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget in seconds of training.", min=1)] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="name=value of the job's distillation object, as rank=16.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="For the student's name, ft:TEACHER:SUFFIX:ID.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run; drawn if not given.", min=0)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay and watch it to its end.")] = False,
    server: Server = LOOPBACK,
    api_key: ServerKey = None,
) -> None:
    """Let a server distil one of its teachers, and serve the student."""
    from distill.overrides import parse_override
    from distill.remote import Server as Remote

    given = {"preset": preset, "method": method, "images": images, "seconds": seconds}
    given |= dict(map(parse_override, overrides or []))
    asked = {name: value for name, value in given.items() if value is not None}
    with Remote(server, api_key) as remote:
        fields = {"model": teacher, "training_file": remote.upload(prompts), "suffix": suffix, "seed": seed}
        job = remote.submit({**fields, "distillation": asked})
        typer.echo(f"{job['id']} is {job['status']}; `distill logs {job['id']}` tells how it goes.")
        if follow:
            _follow(remote, job["id"])


@app.command("jobs")
def list_jobs(
    limit: Annotated[int, typer.Option(help="How many at most, the newest.", min=1, max=100)] = 20,
    server: Server = LOOPBACK,
    api_key: ServerKey = None,
) -> None:
    """List a server's distillation jobs: id, status, images seen of the budget, when made, teacher, student."""
    import time

    from distill.remote import Server as Remote
    from distill.report import si

    with Remote(server, api_key) as remote:
        found = remote.jobs(limit)
    for job in found:
        seen = f"{si(job['images_seen'])} / {si(job['images_total'])}" if job["images_total"] else "-"
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created_at"]))
        words = (job["id"], job["status"], seen, made, job["model"], job["fine_tuned_model"] or "-")
        typer.echo("\t".join(words))


@app.command()
def logs(
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    follow: Annotated[bool, typer.Option("--follow", help="Stay and watch it to its end.")] = False,
    server: Server = LOOPBACK,
    api_key: ServerKey = None,
) -> None:
    """Print what a job has told: progress, figures, alarms."""
    from distill.remote import Server as Remote

    with Remote(server, api_key) as remote:
        if follow:
            _follow(remote, job)
            return
        for event in remote.events(job):
            typer.echo(_told(event))


@app.command()
def cancel(
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    server: Server = LOOPBACK,
    api_key: ServerKey = None,
) -> None:
    """End a job; what it has learnt is not kept."""
    from distill.remote import Server as Remote

    with Remote(server, api_key) as remote:
        status = remote.cancel(job)["status"]
    typer.echo(f"{job} is still running, and ends now." if status == "running" else f"{job} is {status}.")


def _follow(remote: "Remote", name: str) -> None:
    """A job's events and a bar, to its end; a job that fails ends the command with status 1."""
    from distill.console import image_bar

    with image_bar("distilling", None) as bar:
        for job, events in remote.follow(name):
            for event in events:
                bar.say(_told(event))
            bar.update(job["images_seen"], total=job["images_total"])
    if job["status"] != "succeeded":
        error = job["error"]
        raise typer.Exit(_failed(f"{name} {job['status']}" + (f": {error['message']}" if error else "")))
    typer.echo(f"The student is {job['fine_tuned_model']}.")


def _failed(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 1


def _told(event: dict[str, Any]) -> str:
    """An event as a line: when, what, and the figures that people follow."""
    import time

    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["created_at"]))
    data = event["data"] or {}
    figures = [f"{name} {data[name]:.3g}" for name in SHOWN if isinstance(data.get(name), int | float)]
    words = [when, event["message"], *figures]
    return "  ".join(words)


@scenes.command()
def show(
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("runs/scenes.png"),
    count: Annotated[int, typer.Option(help="How many scenes.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of prompts and scenes.")] = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="Combinations that training never sees.")] = False,
) -> None:
    """Write a grid of scenes with their prompts under them."""
    import numpy as np

    from distill.evaluate.picture import labelled_grid, save_png
    from distill.scenes.captions import TASKS, evaluation_prompts, sample_prompt, wording
    from distill.scenes.render import place, render

    rng = np.random.default_rng(seed)
    if held_out:
        prompts = evaluation_prompts(-(-count // len(TASKS)), seed)[:count]
    else:
        prompts = [sample_prompt(rng) for _ in range(count)]
    images = render([place(prompt, rng) for prompt in prompts])
    save_png(labelled_grid([("scene", images)], [wording(prompt, rng) for prompt in prompts]), out)
    typer.echo(f"The grid is {out}.")


_CIFAR10 = "Folder of CIFAR-10's binary version: data_batch_1.bin to data_batch_5.bin, test_batch.bin."
_CONDITIONAL = "Captions are the classes' names; without, one word for all."


@cifar10.command("teacher")
def cifar10_teacher(
    data: Annotated[Path, typer.Argument(help=_CIFAR10)],
    out: Annotated[Path, typer.Option(help="Folder of the teacher and of its training state.")] = Path(
        "runs/cifar10-teacher"
    ),
    images: Annotated[int, typer.Option(help="Images that it is trained on.", min=1)] = 51_200_000,
    batch: Annotated[int, typer.Option(help="Images of a step.", min=1)] = 128,
    conditional: Annotated[bool, typer.Option("--conditional", help=_CONDITIONAL)] = False,
    layers: Annotated[int, typer.Option(help="Blocks of the transformer.", min=1)] = 12,
    heads: Annotated[int, typer.Option(help="Attention heads, of 64 channels each.", min=1)] = 6,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the transformer first.")] = False,
) -> None:
    """Train a pixel-space teacher of CIFAR-10 from nothing, in Stable Diffusion 3's own format.

    The same command continues a training that was stopped, a larger budget continues a finished one.
    """
    from distill.checkpoint import claimed
    from distill.cifar10.teacher import TeacherRecipe, train_teacher
    from distill.console import image_bar
    from distill.device import resolve_device

    recipe = TeacherRecipe(images=images, batch=batch, conditional=conditional, layers=layers, heads=heads, seed=seed)
    training = train_teacher(data, recipe, out, resolve_device(device), compiled)
    with claimed(out), image_bar("teacher", images) as bar, _asked_to_stop() as asked:
        for progress in training:
            bar.update(progress.images, progress.figures)
            if asked:
                progress.save()
                raise _stopped(progress.images, asked)
    typer.echo(f"The teacher is in {out}; `distill run cifar10 --set teacher={out}` distils it.")


@cifar10.command("images")
def cifar10_images(
    data: Annotated[Path, typer.Argument(help=_CIFAR10)],
    out: Annotated[Path, typer.Option(help="Folder of the images and their captions.")],
    test: Annotated[bool, typer.Option("--test", help="Those of the test batch.")] = False,
    conditional: Annotated[bool, typer.Option("--conditional", help=_CONDITIONAL)] = False,
) -> None:
    """Write its images as PNG with their captions: for `distill score --reference`, and as `real.source` of a run."""
    from distill.cifar10.data import write_images
    from distill.console import image_bar

    with image_bar("images", 10_000 if test else 50_000) as bar:
        for written in write_images(data, out, conditional, test):
            bar.update(written)
    typer.echo(f"The images are in {out}.")


@prompts.command()
def stats(
    source: Annotated[str, typer.Argument(help=_SOURCE)],
    teacher: Annotated[Path | None, typer.Option(help="Teacher folder, to count in its tokens too.")] = None,
) -> None:
    """Count a source's prompts, its repetitions and empty lines, and how long its different prompts are."""
    from distill.console import out, table
    from distill.prompts import prompt_stats

    found = prompt_stats(source, teacher)
    rows = []
    for name, spread in found.lengths.items():
        figures = (spread.minimum, spread.median, spread.p95, spread.maximum)
        over = "" if spread.limit is None else f"{spread.over} over {spread.limit}"
        rows.append((name, *map(str, figures), over))
    out.print(table("lengths", ("", "min", "median", "p95", "max", "over the limit"), rows))
    out.print(
        f"{found.prompts} prompts, {found.prompts - found.repeated} different, {found.repeated} repeated; "
        f"{found.empty} empty lines passed over."
    )


def main() -> None:
    """Entry point of the console command: errors of ours, and a full disk, become one sentence and status 2.

    Status 75 is to try again later.
    """
    try:
        app()
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if isinstance(error, ClaimedError) else 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}; make room and give the same command again, it continues", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
