"""`distill run` and `distill export`: a teacher into a one-step student."""

import json
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distill.cli.options import Overrides, Seconds, TeacherBase, open_given_teacher
from distill.cli.stopping import agreed, stop_signals, stopped
from distill.errors import ConfigError
from distill.files import check_replaceable

if TYPE_CHECKING:
    from distill.config import RunConfig


def run(
    config: Annotated[str, typer.Argument(help="Preset (scenes-debug, scenes, sd3-medium-lora, ...) or YAML file.")],
    overrides: Overrides = None,
    method: Annotated[str | None, typer.Option(help="A method in place of the preset's: fgm, dmd, ...")] = None,
    seconds: Seconds = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/PRESET if not given.", file_okay=False)] = None,
) -> None:
    """Distill a teacher into a one-step student.

    The same command continues a run that was stopped, killed or given a larger budget; Ctrl-C stops it at the end of
    a step and keeps what was learned (status 130; 143 after SIGTERM; 75 while another process writes to the folder).
    Under `accelerate launch -m distill.cli run ...` it uses every process.
    """
    import yaml

    from distill.config import load_config

    chosen = [] if method is None else [f"method.name={method}"]
    resolved = load_config(config, [*chosen, *(overrides or [])])
    folder = out or Path("runs") / Path(config).name.removesuffix(".yaml").removesuffix(".yml")

    if run_with_bars(resolved, folder, yaml.safe_dump(resolved.as_dict(), sort_keys=False), seconds):
        typer.echo(
            f"The student is in {folder / 'student'}; `fgm-service serve --model {folder / 'student'}` serves it."
        )


def run_with_bars(config: "RunConfig", folder: Path, heading: str, seconds: float | None = None) -> bool:
    """Run with progress bars; False in all processes but the first. `seconds` are a budget in place of images."""
    from distill import run as runs
    from distill.cli import console
    from distill.cli.console import SHOWN, image_bar
    from distill.data.embedding_cache import EmbedProgress
    from distill.data.image_cache import EncodeProgress
    from distill.data.sources import PROMPT_SOURCES
    from distill.evaluate.references import ReferenceProgress
    from distill.plan.run_estimate import RunEstimate
    from distill.training.processes import wait_for_main

    machine = runs.accelerator(config, folder)
    console.quiet(not machine.is_main_process)
    built_in = config.prompts.source in PROMPT_SOURCES  # a file may hold fewer
    totals = {"prompts": config.prompts.max_count if built_in else None}
    if config.real is not None:
        totals["real images"] = config.real.max_count
    bar, shown = None, ""
    with ExitStack() as bars, stop_signals() as signals, closing(runs.run(config, folder, machine, seconds)) as steps:
        for progress in steps:
            if not shown and machine.is_main_process:
                typer.echo(heading)
            if isinstance(progress, RunEstimate):
                shown = "estimate"
                typer.echo("\n".join(progress.lines()))
                continue
            if isinstance(progress, EmbedProgress):
                phase, seen, metrics = "prompts", progress.prompts, {"truncated": float(progress.truncated)}
            elif isinstance(progress, EncodeProgress):
                phase, seen, metrics = "real images", progress.images, {"skipped": float(progress.skipped)}
            elif isinstance(progress, ReferenceProgress):
                phase, seen, metrics = "teacher's images", progress.images, {}
                totals[phase] = progress.total
            else:
                phase, seen = "distilling", progress.images
                metrics = {name: progress.metrics[name] for name in SHOWN if name in progress.metrics}
                totals[phase] = progress.total
            if bar is None or phase != shown:
                bars.close()
                bar, shown = bars.enter_context(image_bar(phase, totals[phase])), phase
            bar.update(seen, metrics)
            if isinstance(progress, EmbedProgress | EncodeProgress | ReferenceProgress):
                if signals:
                    raise typer.Exit(128 + signals[0])  # complete shards and images are kept
                continue
            for note in progress.notes:
                bar.print(note)
            if stops := agreed(signals, machine):
                if machine.is_main_process:
                    progress.save()
                wait_for_main(machine)  # a launcher kills the other processes when one exits
                machine.end_training()
                raise stopped(progress.images, stops)
    if not shown and machine.is_main_process:
        typer.echo(heading)
    machine.end_training()
    return bool(machine.is_main_process)


def export(
    run: Annotated[Path, typer.Argument(help="Run folder: finished, stopped or running.")],
    out: Annotated[
        Path | None, typer.Option(help="Student folder. Default: student in the run folder.", file_okay=False)
    ] = None,
    checkpoint: Annotated[
        str,
        typer.Option(help="best, last, or the number of images of a checkpoint; best is the last without evaluations."),
    ] = "best",
    dtype: Annotated[Literal["fp16", "bf16", "fp32"], typer.Option(help="Precision of the transformer.")] = "fp16",
    max_shard_size: Annotated[str, typer.Option(help="Size of one file of weights at most: 5GB, 500MB.")] = "5GB",
    license: Annotated[
        str | None, typer.Option("--license", help="License of the card; what the teacher's says if not given.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Where the run's teacher is now. Default: as in the run.")] = None,
    teacher_base: TeacherBase = None,
    single_file: Annotated[
        Path | None,
        typer.Option(help="Also write this .safetensors file for ComfyUI: transformer and VAE.", dir_okay=False),
    ] = None,
    text_encoders: Annotated[bool, typer.Option("--text-encoders", help="Put them into the single file too.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare with stock diffusers; a difference fails.")] = False,
    device: Annotated[str, typer.Option(help="Where --check computes: cpu, cuda, cuda:1, auto.")] = "auto",
) -> None:
    """Write the student of a run, as `distill run` does at its end.

    The student is the averaged one of a checkpoint; a LoRA run's folder also holds the adapter, for diffusers and
    ComfyUI. An older student in the same place is replaced; a folder that holds anything else is refused.
    """
    if single_file is None and text_encoders:
        raise ConfigError("--text-encoders goes with --single-file; give both, or neither")
    if single_file is not None:
        if single_file.suffix != ".safetensors":
            raise ConfigError(f"--single-file {single_file}: name a .safetensors file")
        check_replaceable(single_file)

    from functools import partial

    import torch

    from distill.models.device import resolve_device
    from distill.models.sd3_folder import SD3Folder
    from distill.models.single_file import check_projection, write_single_file
    from distill.student.parity import TOLERANCE, check_parity
    from distill.student.run_export import export_run
    from distill.training.preparation import open_moved, read_config, read_teacher

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    moved = open_given_teacher(teacher, teacher_base, partial(open_moved, run))
    if text_encoders:
        check_projection(moved or read_teacher(read_config(run), run))  # before the folder is written
    folder = export_run(run, out, checkpoint, kind, max_shard_size, license, moved)
    record = json.loads((folder / "onestep.json").read_text())
    typer.echo(f"The student after {record['images_seen']} images is in {folder}.")
    if single_file is not None:
        write_single_file(SD3Folder.read(folder, record["name"]), single_file, text_encoders)
        typer.echo(f"Its single file is {single_file}.")
    if check:
        largest = check_parity(folder, resolve_device(device))
        typer.echo(
            f"Stock diffusers makes the same latents: they differ by {largest:.1e} at most, {TOLERANCE:g} is allowed."
        )
