"""`distill run` and `distill export`: a teacher into a one-step student."""

import json
import os
import shlex
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distill.cli.imports import collector_paused
from distill.cli.options import Overrides, Seconds, TeacherBase, open_given_teacher
from distill.cli.stopping import agreed, stop_signals, stopped, stopped_between_files
from distill.errors import ConfigError
from distill.files import check_replaceable

if TYPE_CHECKING:
    from distill.config import RunConfig
    from distill.data.embedding_cache import EmbedProgress
    from distill.data.image_cache import EncodeProgress
    from distill.evaluate.references import ReferenceProgress
    from distill.training.trainer import Progress


def run(
    config: Annotated[str, typer.Argument(help="Preset (scenes-debug, scenes, sd3-medium-lora, ...) or YAML file.")],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the student. Default: the teacher's, with -one-step.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Method that replaces the preset's: fgm, dmd, ...")] = None,
    seconds: Seconds = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/NAME, or runs/PRESET without one.", file_okay=False)
    ] = None,
) -> None:
    """Distill a teacher into a one-step student.

    Run the same command again to resume a run that was stopped or killed, or with a larger budget. Ctrl-C stops after
    the current step and saves a checkpoint. `accelerate launch -m distill.cli run ...` uses several GPUs, and on CPUs
    `ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m distill.cli run ...` uses two processes.

    Exit status: 130 after Ctrl-C, 143 after SIGTERM, 75 while another process writes to the folder.
    """
    from distill.config import changes, load_config

    chosen = [] if method is None else [f"method.name={method}"]
    chosen += [] if name is None else [f"name={name}"]
    resolved = load_config(config, [*chosen, *(overrides or [])])
    preset = Path(config).name.removesuffix(".yaml").removesuffix(".yml")
    folder = out or Path("runs") / (resolved.name or preset)
    lines = [f"{key} = {value}" for key, value in changes(load_config(config), resolved).items()]
    heading = "\n".join([f"{preset}, with" if lines else f"{preset}, unchanged", *(f"  {line}" for line in lines)])
    if run_with_bars(resolved, folder, heading, seconds):
        typer.echo(next_steps(resolved, folder))


def next_steps(config: "RunConfig", folder: Path) -> str:
    """Commands for the student of a run: look at it, evaluate it, export it, serve it."""
    from distill.report.evaluation_output import PICTURE, evaluate_command
    from distill.report.run_folder import read_run

    student = folder / "student"
    commands = {
        "look": shlex.join(["distill", "report", str(folder)]),
        "evaluate": evaluate_command(read_run(folder), folder / PICTURE),
        "export": shlex.join(["distill", "export", str(folder), "--single-file", str(folder / "student.safetensors")]),
        "serve": shlex.join(["fgm-service", "serve", "--model", str(student)]),
    }
    if config.teacher != "scenes" and not Path(config.evaluation.prompts or config.prompts.source).is_file():
        del commands["evaluate"]  # it takes a file of prompts
    lines = [f"  {what:<10}{command}" for what, command in commands.items()]
    return "\n".join([f"The student is in {student}. Next:", *lines])


def run_with_bars(config: "RunConfig", folder: Path, heading: str, seconds: float | None = None) -> bool:
    """Run with progress bars; False in all processes but the first. `seconds` are a budget in place of images."""
    from distill.training.preflight import preflight

    several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
    teacher = None if several else preflight(config, folder)

    with collector_paused():
        from distill import run as runs
        from distill.cli import console
        from distill.cli.console import image_bar
        from distill.plan.run_estimate import RunEstimate
        from distill.training.processes import wait_for_main
        from distill.training.trainer import Progress

    machine = runs.accelerator(config, folder)
    if several:  # the first process may fetch a teacher; a launcher ends the others when it exits
        teacher = preflight(config, folder) if machine.is_main_process else None
        wait_for_main(machine)
    console.quiet(not machine.is_main_process)
    precision = "bf16" if machine.mixed_precision == "bf16" else "fp32"
    heading += f"\nProcesses: {machine.num_processes}, on {machine.device.type} in {precision}."
    totals: dict[str, int] = {}
    bar, shown = None, ""
    running = runs.run(config, folder, machine, seconds, teacher)
    with ExitStack() as bars, stop_signals() as signals, closing(running) as steps:
        for progress in steps:
            if not shown and machine.is_main_process:
                typer.echo(heading)
            if isinstance(progress, runs.Activity):
                if bar is not None:
                    bar.show(progress.name)
                continue
            if isinstance(progress, RunEstimate):
                shown = "estimate"
                totals |= {"prompts": progress.prompts, "real images": progress.real_images}
                typer.echo("\n".join(progress.lines()))
                continue
            phase, seen, metrics, total = _phase_of(progress)
            total = totals.get(phase) if total is None else total
            if bar is None or phase != shown:
                bars.close()
                unit = "prompts" if phase == "prompts" else "images"
                bar, shown = bars.enter_context(image_bar(phase, total, unit)), phase
            bar.update(seen, metrics)
            if not isinstance(progress, Progress):
                if signals:
                    raise stopped_between_files(signals)
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


def _phase_of(
    progress: "EmbedProgress | EncodeProgress | ReferenceProgress | Progress",
) -> tuple[str, int, dict[str, float], int | None]:
    """The phase of a run, what was done in it, the metrics that are shown, and the total if the progress has it."""
    from distill.cli.console import SHOWN
    from distill.data.embedding_cache import EmbedProgress
    from distill.data.image_cache import EncodeProgress
    from distill.evaluate.references import ReferenceProgress

    if isinstance(progress, EmbedProgress):
        return "prompts", progress.prompts, {"truncated": progress.truncated}, None
    if isinstance(progress, EncodeProgress):
        return "real images", progress.images + progress.skipped, {"skipped": progress.skipped}, None
    if isinstance(progress, ReferenceProgress):
        return "teacher's images", progress.images, {}, progress.total
    metrics = {name: progress.metrics[name] for name in SHOWN if name in progress.metrics}
    return "distilling", progress.images, metrics, progress.total


def export(
    run: Annotated[Path, typer.Argument(help="Run folder: finished, stopped or running.")],
    out: Annotated[
        Path | None, typer.Option(help="Student folder. Default: student in the run folder.", file_okay=False)
    ] = None,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="best, last, or the number of images of a checkpoint. Without evaluations, best is the last. With "
            "several numbers, such as 10240,20480, the students are averaged."
        ),
    ] = "best",
    average_with: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of another student of the teacher, such as an earlier stage: the mean of both is written. Can "
            "be repeated; each student counts as much as the run's.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    dtype: Annotated[Literal["fp16", "bf16", "fp32"], typer.Option(help="Precision of the transformer.")] = "fp16",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file, such as 5GB or 500MB.")] = "5GB",
    license: Annotated[
        str | None, typer.Option("--license", help="License of the model card. Default: that of the teacher's card.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="New path of the run's teacher, if it was moved.")] = None,
    teacher_base: TeacherBase = None,
    single_file: Annotated[
        Path | None,
        typer.Option(help="Also write this .safetensors file for ComfyUI: transformer and VAE.", dir_okay=False),
    ] = None,
    text_encoders: Annotated[
        bool, typer.Option("--text-encoders", help="Include the text encoders in the single file.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with stock diffusers; fail if the latents differ.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Device of --check: cpu, cuda, cuda:N. auto: a GPU if there is one.")
    ] = "auto",
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

    from distill.models.sd3_folder import SD3Folder
    from distill.report.run_folder import read_run
    from distill.student.place import check_place
    from distill.training.run_teacher import open_moved, read_config, read_teacher

    read_run(run)
    settings = read_config(run)
    moved = open_given_teacher(teacher, teacher_base, partial(open_moved, run))
    check_place(out or run / "student", moved.path if moved is not None else Path(settings.teacher))

    import torch

    from distill.models.device import resolve_device
    from distill.models.single_file import check_projection, write_single_file
    from distill.student.parity import TOLERANCE, check_parity
    from distill.student.run_export import export_run

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    if text_encoders:
        check_projection(moved or read_teacher(settings, run))  # before the folder is written
    folder = export_run(run, out, checkpoint, kind, max_shard_size, license, moved, average_with or ())
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
