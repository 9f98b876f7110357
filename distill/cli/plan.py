"""`distill plan`: whether a distillation fits a device."""

import json
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from distill.cli.options import MOST, TEACHER, TeacherBase, finite


def plan(
    teacher: Annotated[str, typer.Argument(help=f"sd3-medium, sd3.5-medium, sd3.5-large, {TEACHER}")] = "sd3-medium",
    teacher_base: TeacherBase = None,
    device_memory: Annotated[float, typer.Option(help="Device memory in GiB.", min=0, max=1e6, callback=finite)] = 80,
    mode: Annotated[Literal["lora", "full"], typer.Option(help="lora: adapters on a base. full: copies.")] = "lora",
    batch: Annotated[int, typer.Option(help="Images per forward pass, a run's `micro_batch`.", min=1, max=1 << 20)] = 4,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels. Default: native.", min=1)] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.", min=1, max=1 << 20)] = 64,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision of the run.")] = "bf16",
    method: Annotated[str, typer.Option(help="`method.name` of the run, with settings of the preset.")] = "fgm",
    optimizer: Annotated[Literal["adam", "adam-8bit"], typer.Option(help="`optimizer.kind` of the run.")] = "adam",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute blocks again in the backward.")] = False,
    reserve: Annotated[
        float, typer.Option(help="GiB for the driver, libraries and the allocator.", min=0, max=1e6, callback=finite)
    ] = 2,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="Peak TFLOP/s; that of an H100 if not given: 989 in bf16, 67 in fp32.",
            min=1e-6,
            max=1e9,
            callback=finite,
        ),
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(
            help="Share of that peak; measured 0.26, or with --compile an estimate of 0.35, if not given.",
            min=1e-6,
            max=1,
            callback=finite,
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="`networks.compile` of the run; for the speed.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="method.key=value, as for `distill run`; may be repeated.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Distinct prompts of the run.", min=1, max=MOST)] = 1_000_000,
    images: Annotated[int, typer.Option(help="Images of the run.", min=1, max=MOST)] = 1_000_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Predict memory, arithmetic and speed of a distillation, and whether it fits a device.

    Only configuration files are read: the real networks run the real training steps on tensors without data. This
    takes a minute or two for SD3. Set the options as in the run: the presets of SD3 have --gradient-checkpointing.
    """
    from distill.cli.console import out, table, working
    from distill.models.geometry import read_geometry
    from distill.plan.estimate import GIB, PEAK, UTILIZATION, changes_that_fit, plan_input
    from distill.plan.run_estimate import estimate_plan

    geometry = read_geometry(teacher, teacher_base)
    made = plan_input(
        geometry,
        mode,
        rank,
        gradient_checkpointing,
        dtype,
        batch,
        size or geometry.image_size,
        method,
        optimizer,
        prompts,
        overrides or (),
    )
    available = int((device_memory - reserve) * GIB)
    with working("planning, without data"):
        result = made.plan()
        fits = result.peak <= available
        changes = [] if fits else changes_that_fit(made, result, available)
    share = utilization or UTILIZATION["compiled" if compiled else "eager"]
    rate = (tflops or PEAK[dtype]) * 1e12 * share
    speed = rate / result.flop_per_image
    estimate = estimate_plan(made, result, prompts, images, rate)
    if as_json:
        values = {**result.as_dict(), "fits": fits, "changes": changes, "images_per_second": speed}
        values |= {**asdict(estimate), "disk_bytes": estimate.disk, "encoding_share": estimate.encoding_share}
        typer.echo(json.dumps(values, indent=2))
        return
    rows = [(part, f"{size / GIB:.2f}") for part, size in result.parts().items()]
    rows += [(f"peak: {stage}", f"{size / GIB:.2f}") for stage, size in result.stages.items()]
    out.print(table(f"{geometry.name}, {result.parameters / 1e9:.2f} B parameters", ("", "GiB"), rows))
    out.print(f"{result.flop_per_image / 1e12:.1f} TFLOP an image; about {speed:.2f} images/s on such a device.")
    out.print("\n".join(estimate.lines()))
    needs = f"{result.peak / GIB:.1f} GiB and {reserve:g} GiB set aside"
    if fits:
        out.print(f"It fits {device_memory:g} GiB: {needs}.")
    else:
        enough = f"enough alone: {', or '.join(changes)}" if changes else "no single change is enough"
        out.print(f"It does not fit {device_memory:g} GiB: {needs}; {enough}.")
