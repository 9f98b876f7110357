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
    from distill.config import is_preset, load_config
    from distill.errors import ConfigError
    from distill.models.geometry import PUBLISHED, read_geometry

    options = {
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
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    if not is_preset(what):
        for override in overrides or ():
            if not override.startswith("method."):
                raise ConfigError(
                    f"--set {override}: here only method.* can be set; the rest are options of this command"
                )
    given += overrides or ()
    run = load_config(what, given) if is_preset(what) else None
    teacher, base = (what, teacher_base) if run is None else (run.teacher, teacher_base or run.teacher_base)
    geometry = read_geometry(PUBLISHED.get(teacher, teacher), base)

    from distill.cli.console import out, table, working
    from distill.plan.options import changes_that_fit, run_input, teacher_config
    from distill.plan.run_estimate import estimate_plan
    from distill.report.units import duration, si

    if run is None:
        run, batch = teacher_config(geometry, given), batch or 4
    made = run_input(geometry, run, batch, size)
    known = DEVICES[device]
    memory = known.memory if device_memory is None else device_memory
    available = int((memory - reserve) * GIB)
    with working("planning, without data"):
        result = made.plan()
        fits = result.peak <= available
        changes = [] if fits else changes_that_fit(made, result, available)
    # `auto` compiles on a GPU, and is bf16 there.
    share = utilization or UTILIZATION["eager" if run.networks.compile is False else "compiled"]
    rate = (tflops or (known.fp32 if run.precision == "fp32" else known.bf16)) * 1e12 * share
    speed = rate / result.flop_per_image
    estimate = estimate_plan(run, made, result, rate)
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
    out.print(f"{flop} an image, about {speed:.2f} images/s on {on}; {run.images} images take about {takes}.")
    out.print("\n".join(estimate.lines()))
    needs = f"{result.peak / GIB:.1f} GiB and {reserve:g} GiB set aside"
    if fits:
        out.print(f"It fits {memory:g} GiB: {needs}.")
    else:
        enough = f"enough: {', or '.join(changes)}" if changes else "no change of these settings is enough"
        out.print(f"It does not fit {memory:g} GiB: {needs}; {enough}.")
