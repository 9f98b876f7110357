"""`distill compare`: several ways to distill one teacher."""

import os
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import LAST_SEED, MOST, Seconds
from distill.cli.run import distil_with_bars, encode_with_bars


def compare(
    variants: Annotated[
        list[str], typer.Argument(help="Methods or YAML files, each with its own keys: fgm,method.alpha=0.5.")
    ],
    config: Annotated[str, typer.Option(help="Preset or YAML file that methods take everything else from.")] = "scenes",
    images: Annotated[int | None, typer.Option(help="Budget of each in images; the preset's.", min=1, max=MOST)] = None,
    seconds: Seconds = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value for all of them.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of what is found.", file_okay=False)] = Path(
        "runs/compare"
    ),
    per_task: Annotated[int, typer.Option(help="Held-out prompts of each of the six tasks.", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Steps of the teacher.", min=1)] = 28,
    seed: Annotated[int, typer.Option(help="Seed of the evaluation's prompts and images.", min=0, max=LAST_SEED)] = 0,
) -> None:
    """Distill one teacher in several ways with equal images or seconds, and evaluate all students.

    Leaves one run folder each, `compare.json`, `compare.md` and `compare.png`. The same command continues, also with
    more variants; finished runs are not repeated. A run that diverges or cannot start is reported, and the others
    go on.
    """
    import shlex

    import torch

    from distill.cli.console import image_bar, table
    from distill.cli.console import out as console
    from distill.errors import ConfigError, DistillError, DivergedError, RunError
    from distill.experiments import (
        check_folder,
        is_finished,
        is_scored,
        judged,
        read_variants,
        share_embeddings,
        within,
    )
    from distill.models.device import resolve_device
    from distill.run import check_unchanged, read_teacher
    from distill.worlds.scenes.evaluator import SceneEvaluator

    if images is not None and seconds is not None:
        raise ConfigError("--images and --seconds are both given; give one, the other follows from it")
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise ConfigError(
            "distill compare is one process; under accelerate, launch each `distill run` with a folder under --out, "
            "named as the variant, and compare them afterwards"
        )
    words = [*variants, "--config", config, *(part for each in overrides or [] for part in ("--set", each))]
    words += ["--images", str(images)] if images else ["--seconds", f"{seconds:g}"] if seconds else []
    words += ["--per-task", str(per_task), "--steps", str(steps), "--seed", str(seed)]
    where = resolve_device("auto")
    planned = read_variants(variants, config, overrides or [], images)
    check_folder(out)
    finished, diverged, failed = [], {}, {}
    for variant in planned:
        try:
            share_embeddings(variant, planned, out)
            teacher = read_teacher(variant.config)
            if seconds is not None:
                encode_with_bars(variant.config, out / variant.name, teacher, where)
                variant = within(seconds, variant, out, teacher)
            if is_finished(variant, out, teacher):
                check_unchanged(variant.config, out / variant.name, teacher)
            else:
                distil_with_bars(variant.config, out / variant.name, f"{variant.name}: {variant.config.images} images")
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
    questions = SceneEvaluator().prompts(per_task, seed)
    total = (1 + len(finished)) * questions.count if is_scored(finished[0].config) else None
    with image_bar("images", total) as bar:
        outcome = judged(finished, out, questions, steps, seed, where, bar.advance, diverged, failed)
    outcome.save(out, {"command": shlex.join(["distill", "compare", *words]), "images": images, "seconds": seconds})
    console.print(table(f"students of {planned[0].config.teacher}", *outcome.table()))
    console.print(f"The table is {out / 'compare.md'}, the picture {out / 'compare.png'}.")
