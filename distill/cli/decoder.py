"""`distill decoder`: train a small decoder that takes the place of a model's VAE."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distill.cli.options import (
    MOST,
    SOURCE,
    Device,
    Guidance,
    Overrides,
    Seconds,
    SkipLayers,
    SkipScale,
    TeacherBase,
    teacher_guidance,
)
from distill.cli.stopping import stop_signals, stopped, stopped_between_files

if TYPE_CHECKING:
    import torch

    from distill.decoder.run import DecoderRun

_SHOWN = ("psnr", "ssim", "score_ratio")  # metrics beside the bar


def decoder(
    model: Annotated[
        str,
        typer.Argument(
            help="Student or teacher: a folder, `scenes`, a .safetensors file or a model of the hub.",
            metavar="TEACHER_OR_STUDENT",
        ),
    ],
    teacher_base: TeacherBase = None,
    images: Annotated[
        int | None, typer.Option(help="Budget in training images. Default: 200000.", min=1, max=MOST)
    ] = None,
    seconds: Seconds = None,
    prompts: Annotated[
        str | None, typer.Option(help=f"Prompts of the images it learns from. Default: the student's own. {SOURCE}")
    ] = None,
    images_from: Annotated[
        str | None, typer.Option(help="Real images to learn from in addition: a folder or tar shards.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps of a teacher.", min=1)] = 8,
    guidance: Guidance = None,
    skip_layers: SkipLayers = "",
    skip_scale: SkipScale = None,
    student: Annotated[
        list[Path] | None,
        typer.Option(help="Student folder that gets the decoder; repeatable. Default: the given student."),
    ] = None,
    default: Annotated[
        Literal["auto", "full", "small"],
        typer.Option(help="Decoder that the student uses by default. auto: small if a dataset's score shows no loss."),
    ] = "auto",
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the training.", file_okay=False)] = Path("runs/decoder"),
    device: Device = "auto",
) -> None:
    """Train a small decoder that makes nearly the images of a model's VAE in a fraction of the time.

    No data is needed: the model generates images of prompts, and the small decoder is trained to reproduce the pixels
    of the VAE. It is an `AutoencoderTiny` of diffusers, written to OUT/decoder and added to the student folder
    as `decoder/`, with its digest and the default in `onestep.json`. Any student of the same teacher can use it.

    Run the same command again to resume; a larger budget continues a finished training. Ctrl-C stops after the current
    step and saves its state. `distill report OUT` shows curves, grids and alarms. The keys of `--set` are in
    docs/distill.md.

    Example: distill decoder runs/mine/student --seconds 600 --out runs/mine-decoder
    """
    from distill.config import Prompts, RealImages, read_group
    from distill.data.images import read_examples
    from distill.data.prompts import read_prompts
    from distill.decoder.recipe import DecoderRecipe
    from distill.errors import ConfigError
    from distill.models.sd3_folder import SD3Folder
    from distill.models.teacher import open_teacher
    from distill.student.spec import is_student
    from distill.training.preflight import check_source

    if images is not None and seconds is not None:
        raise ConfigError("--images and --seconds are both given; give one of them")
    recipe = read_group(DecoderRecipe, [*(overrides or []), *([f"images={images}"] if images is not None else [])])
    if prompts is not None:
        check_source(Prompts(source=prompts), read_prompts)
    if images_from is not None:
        check_source(RealImages(source=images_from), read_examples)
    source = open_teacher(model, teacher_base)
    given = is_student(source)
    if given and (guidance is not None or skip_layers):
        raise ConfigError("--guidance and --skip-layers are for teachers; a student makes images in one step")
    guided = None if given else teacher_guidance(source, guidance, skip_layers, skip_scale)
    students = [SD3Folder.read(folder) for folder in student or ()]
    for each in students:
        if not is_student(each):
            raise ConfigError(f"--student {each.path} is a teacher; name the folder of a student")
    if given and student is None and source.revision is None:
        students = [source]

    from distill.cli.console import out as console
    from distill.cli.console import table
    from distill.decoder.run import DecoderRun, resolve
    from distill.evaluate.sampler import Sampling
    from distill.models.device import resolve_device
    from distill.report.run_folder import read_run

    where = resolve_device(device)
    sampling = None if guided is None else Sampling(steps, guided)
    config = resolve(recipe, source, sampling, prompts, images_from)
    run = DecoderRun(config, source, sampling, out, tuple(students), None if default == "auto" else default)
    _train_with_bars(run, where, seconds)
    rows = [(name, f"{value:.4g}") for name, value in read_run(out).evaluations[-1].items()]
    console.print(table("small decoder", ("", ""), rows))
    console.print(f"The decoder is in {out / 'decoder'}.")
    for each in students:
        console.print(f"It was added to {each.path}.", highlight=False)
    if not students:
        console.print("Add it to a student with the same command and --student FOLDER.", highlight=False)


def _train_with_bars(run: "DecoderRun", device: "torch.device", seconds: float | None) -> None:
    """Train with a progress bar for each phase. Exit the command after a stop signal."""
    from contextlib import ExitStack, closing

    from distill.cli.console import image_bar
    from distill.decoder.latents import LatentProgress
    from distill.decoder.run import distill_decoder

    bar, shown = None, ""
    with ExitStack() as bars, stop_signals() as signals, closing(distill_decoder(run, device, seconds)) as steps:
        for progress in steps:
            phase = progress.what if isinstance(progress, LatentProgress) else "decoder"
            if bar is None or phase != shown:
                bars.close()
                bar, shown = bars.enter_context(image_bar(phase, progress.total)), phase
            if isinstance(progress, LatentProgress):
                bar.update(progress.images)
                if signals:
                    raise stopped_between_files(signals)
                continue
            bar.update(progress.images, {name: progress.metrics[name] for name in _SHOWN if name in progress.metrics})
            for note in progress.notes:
                bar.print(note)
            if signals:
                progress.save()
                raise stopped(progress.images, signals)
