"""`distill compare`: compare several distillations of one teacher."""

import os
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import LAST_SEED, MOST, TEACHER_STEPS, Decoder, Seconds, decoder_choice
from distill.cli.run import run_with_bars


def compare(
    variants: Annotated[list[str], typer.Argument(help="Methods or YAML files, with own keys: fgm,method.alpha=0.5.")],
    config: Annotated[str, typer.Option(help="Preset or YAML file with all other settings of the methods.")] = "scenes",
    images: Annotated[
        int | None, typer.Option(help="Budget of each run in training images. Default: the preset's.", min=1, max=MOST)
    ] = None,
    seconds: Seconds = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value for all variants.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs and results.", file_okay=False)] = Path("runs/compare"),
    per_task: Annotated[int, typer.Option(help="Held-out prompts per task of the toy dataset.", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Sampling steps of the teacher.", min=1)] = TEACHER_STEPS,
    decoder: Decoder = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the evaluation's prompts and images.", min=0, max=LAST_SEED)] = 0,
) -> None:
    """Distill one teacher in several ways with equal images or seconds, and evaluate the students on the same prompts.

    Writes a run folder per variant, `compare.json`, `compare.md` and `compare.png`. Run the same command again to
    resume, also with more variants; finished runs are not repeated. A run that diverges or fails is reported, and the
    others continue.
    """
    import shlex
    from dataclasses import replace

    from distill.errors import ConfigError, DistillError, DivergedError, RunError
    from distill.models.teacher import is_single_file
    from distill.training.run_teacher import read_config, read_teacher
    from distill.variants import check_folder, pin_variants, read_variants

    if images is not None and seconds is not None:
        raise ConfigError("--images and --seconds are both given; give one of them")
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise ConfigError(
            "distill compare runs in one process; under accelerate, launch `distill run` for each variant, in a folder "
            "under --out that is named as the variant, and run distill compare afterwards"
        )
    words = [*variants, "--config", config, *(part for each in overrides or [] for part in ("--set", each))]
    words += ["--images", str(images)] if images else ["--seconds", f"{seconds:g}"] if seconds else []
    words += [] if decoder == "auto" else ["--decoder", decoder]
    words += ["--per-task", str(per_task), "--steps", str(steps), "--seed", str(seed)]
    planned = read_variants(variants, config, overrides or [], images)
    check_folder(out)
    planned = pin_variants(planned, out)
    if not is_single_file(planned[0].config.teacher, planned[0].config.teacher_base):
        read_teacher(planned[0].config, out)  # the same for all

    import torch

    from distill.cli.console import image_bar, table
    from distill.cli.console import out as console
    from distill.experiments import ComparisonOptions, check_budget, evaluate_variants, share_caches
    from distill.models.device import resolve_device

    where = resolve_device("auto")
    finished, diverged, failed = [], {}, {}
    for variant in planned:
        try:
            share_caches(variant, planned, out)
            if seconds is None:
                check_budget(variant, out)
            folder = out / variant.name
            run_with_bars(variant.config, folder, f"{variant.name}: {variant.config.images} images", seconds)
            if seconds is not None:
                variant = replace(variant, config=read_config(folder))
                check_budget(variant, out)
            finished.append(variant)
        except DivergedError as error:
            diverged[variant.name] = str(error)
            typer.echo(f"{variant.name} diverged: {error}")
        except (DistillError, OSError, torch.OutOfMemoryError) as error:
            failed[variant.name] = str(error)
            typer.echo(f"{variant.name} failed: {error}")
    if not finished:
        kind, how = (RunError, "failed") if failed else (DivergedError, "diverged")
        raise kind(f"every run of the comparison {how}; the first: {next(iter((failed or diverged).values()))}")
    options = ComparisonOptions(per_task, steps, seed, decoder_choice(decoder))
    with image_bar("images", None) as bar:
        result = evaluate_variants(finished, out, options, where, bar.advance)
    result = replace(result, diverged=diverged, failed=failed)
    result.save(out, {"command": shlex.join(["distill", "compare", *words]), "images": images, "seconds": seconds})
    console.print(table(f"students of {planned[0].config.teacher}", *result.table()))
    console.print(f"The table is {out / 'compare.md'}, the picture {out / 'compare.png'}.")
