"""`distill plan`: whether a distillation fits a device, and what it costs."""

import json
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from distill.cli.options import MOST, TEACHER, TeacherBase, finite
from distill.plan.devices import DEVICES, GIB, UTILIZATION


def _device(name: str) -> str:
    if name not in DEVICES:
        raise typer.BadParameter(
            f"there is no {name!r}; take {', '.join(DEVICES)}, or give --device-memory and --tflops"
        )
    return name


_WHAT = f"A preset or YAML file, sd3-medium, sd3.5-medium, sd3.5-large, {TEACHER}"
_DEVICE = f"{', '.join(DEVICES)}: memory and peak TFLOP/s."


def plan(
    what: Annotated[str, typer.Argument(help=_WHAT, metavar="PRESET_OR_TEACHER")] = "sd3-medium-lora",
    teacher_base: TeacherBase = None,
    device: Annotated[str, typer.Option(help=_DEVICE, callback=_device)] = "h100",
    device_memory: Annotated[
        float | None,
        typer.Option(help="Device memory in GiB. Default: that of --device.", min=0, max=1e6, callback=finite),
    ] = None,
    mode: Annotated[
        Literal["lora", "full"] | None,
        typer.Option(help="lora: adapters on one base. full: full copies of the teacher. [lora]"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images per forward pass, a run's `micro_batch`. [4]", min=1, max=1 << 20)
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels. [native]", min=1)] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters. [64]", min=1, max=1 << 20)] = None,
    dtype: Annotated[Literal["bf16", "fp32"] | None, typer.Option(help="Precision of the run. [bf16]")] = None,
    method: Annotated[
        str | None, typer.Option(help="`method.name` of the run, with settings of the preset. [fgm]")
    ] = None,
    optimizer: Annotated[
        Literal["adam", "adam-8bit"] | None, typer.Option(help="`optimizer.kind` of the run. [adam]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing", help="Recompute blocks in the backward pass. [no]"
        ),
    ] = None,
    reserve: Annotated[
        float, typer.Option(help="GiB set aside for driver, libraries and allocator.", min=0, max=1e6, callback=finite)
    ] = 2,
    tflops: Annotated[
        float | None,
        typer.Option(help="Peak TFLOP/s. Default: that of --device.", min=1e-6, max=1e9, callback=finite),
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(
            help=f"Share of the peak that is reached. Default: {UTILIZATION['eager']} (measured), with --compile "
            f"{UTILIZATION['compiled']} (estimated).",
            min=1e-6,
            max=1,
            callback=finite,
        ),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="`networks.compile` of the run; changes only the speed. [no]"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the run; for a teacher, of its method only: method.key=value."),
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Distinct prompts of the run. [1000000]", min=1, max=MOST)] = None,
    images: Annotated[int | None, typer.Option(help="Images of the run. [1000000]", min=1, max=MOST)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Predict memory, disk and hours of a distillation, and whether it fits a device.

    A preset gives the defaults of all options; the defaults in brackets are those of a teacher. No weights are needed:
    the training steps run on tensors without data.
    """
    from distill.config import RunConfig, is_preset, load_config
    from distill.models.geometry import PUBLISHED, read_geometry

    run: RunConfig | None = None
    teacher = what
    if is_preset(what):
        given = {
            "networks.kind": mode,
            "networks.rank": rank,
            "networks.gradient_checkpointing": gradient_checkpointing,
            "networks.compile": compiled,
            "optimizer.kind": optimizer,
            "precision": dtype,
            "method.name": method,
            "prompts.max_count": prompts,
            "images": images,
        }
        run = load_config(
            what, [*(f"{key}={value}" for key, value in given.items() if value is not None), *(overrides or [])]
        )
        teacher, teacher_base = run.teacher, teacher_base or run.teacher_base
        prompts, images = run.prompts.max_count, run.images
        dtype = "fp32" if run.precision == "fp32" else "bf16"
        compiled = run.networks.compile is not False  # `auto` compiles on a GPU
    prompts, images, dtype = prompts or 1_000_000, images or 1_000_000, dtype or "bf16"
    geometry = read_geometry(PUBLISHED.get(teacher, teacher), teacher_base)

    from distill.cli.console import out, table, working
    from distill.plan.options import changes_that_fit, plan_input, run_input
    from distill.plan.run_estimate import estimate_plan
    from distill.report.units import duration, si

    if run is not None:
        made = run_input(geometry, run, batch, size)
    else:
        made = plan_input(
            geometry,
            mode or "lora",
            rank or 64,
            bool(gradient_checkpointing),
            dtype,
            batch or 4,
            size or geometry.image_size,
            method or "fgm",
            optimizer or "adam",
            prompts,
            overrides or (),
        )
    known = DEVICES[device]
    memory = known.memory if device_memory is None else device_memory
    available = int((memory - reserve) * GIB)
    with working("planning, without data"):
        result = made.plan()
        fits = result.peak <= available
        changes = [] if fits else changes_that_fit(made, result, available)
    share = utilization or UTILIZATION["compiled" if compiled else "eager"]
    rate = (tflops or (known.bf16 if dtype == "bf16" else known.fp32)) * 1e12 * share
    speed = rate / result.flop_per_image
    settings = (None, None) if run is None else (run.evaluation, run.cadence)
    estimate = estimate_plan(made, result, prompts, images, rate, *settings)
    if as_json:
        values = {**result.as_dict(), "fits": fits, "changes": changes, "images_per_second": speed}
        values |= {**asdict(estimate), "disk_bytes": estimate.disk, "encoding_share": estimate.encoding_share}
        typer.echo(json.dumps(values, indent=2))
        return
    rows = [(part, f"{size / GIB:.2f}") for part, size in result.parts().items()]
    rows += [(f"peak: {stage}", f"{size / GIB:.2f}") for stage, size in result.stages.items()]
    out.print(table(f"{geometry.name}, {result.parameters / 1e9:.2f} B parameters", ("", "GiB"), rows))
    planned = {
        "mode": made.kind.kind if made.kind.kind == "full" else f"lora of rank {made.kind.rank}",
        "batch": f"{made.batch} images of {made.size} pixels",
        "optimizer": made.optimizer,
        "gradient checkpointing": "on" if made.kind.gradient_checkpointing else "off",
    }
    out.print(f"Planned: {', '.join(f'{name} {value}' for name, value in planned.items())}.")
    on = device if device_memory is None else "this device"
    hours = estimate.training_seconds / 3600
    takes = f"{hours:.3g} hours" if hours >= 1 else duration(estimate.training_seconds)
    tera = result.flop_per_image / 1e12
    flop = f"{tera:.1f} TFLOP" if tera >= 1 else si(result.flop_per_image, "FLOP")
    out.print(f"{flop} an image, about {speed:.2f} images/s on {on}; {images} images take about {takes}.")
    out.print("\n".join(estimate.lines()))
    needs = f"{result.peak / GIB:.1f} GiB and {reserve:g} GiB set aside"
    if fits:
        out.print(f"It fits {memory:g} GiB: {needs}.")
    else:
        enough = f"enough: {', or '.join(changes)}" if changes else "no change of these settings is enough"
        out.print(f"It does not fit {memory:g} GiB: {needs}; {enough}.")
