"""`distill teacher` and `distill scenes show`: the toy dataset that ships with the project."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import LAST_SEED, Compiled, Device, finite
from distill.cli.stopping import train_with_bar
from distill.errors import ConfigError

_START = "Teacher folder that transformer and text encoders start from; its autoencoder is copied."
_VAE = "Images that the autoencoder is trained on; 26000, or none with --start."
_COARSE = "How many of them, the first, on large patches; 660000, or none with --start."
_WEIGHTS = "Shares of the scenes, as task=number,...; a task that is left out has none. Equal shares if not given."
_DECAY = "Last images, over which the rate falls linearly to 2 % of its peak."


def teacher(
    out: Annotated[Path, typer.Option(help="Folder of the teacher and of its training state.", file_okay=False)] = Path(
        "runs/teacher"
    ),
    start: Annotated[Path | None, typer.Option(help=_START)] = None,
    images: Annotated[int, typer.Option(help="Images that the transformer is trained on.", min=1)] = 1_600_000,
    coarse_images: Annotated[int | None, typer.Option(help=_COARSE, min=0)] = None,
    vae_images: Annotated[int | None, typer.Option(help=_VAE, min=1)] = None,
    scenes: Annotated[int, typer.Option(help="Different scenes among the images.", min=1)] = 40_960,
    task_weights: Annotated[str | None, typer.Option(help=_WEIGHTS)] = None,
    batch: Annotated[int, typer.Option(help="Images of a step.", min=1)] = 64,
    learning_rate: Annotated[
        float, typer.Option(help="Peak of the learning rate.", min=0, max=1, callback=finite)
    ] = 1e-3,
    warmup: Annotated[int, typer.Option(help="First images, over which the rate rises.", min=0)] = 19_200,
    decay: Annotated[int, typer.Option(help=_DECAY, min=0)] = 400_000,
    ema_half_life: Annotated[
        int,
        typer.Option(help="Images after which weights count half in the average; at most 0.1 of those seen.", min=1),
    ] = 44_000,
    per_task: Annotated[int, typer.Option(help="Prompts of each task in an evaluation.", min=1)] = 32,
    evaluate_every: Annotated[int, typer.Option(help="Images between two evaluations.", min=1)] = 64_000,
    checkpoint_every: Annotated[int, typer.Option(help="Images between two saved states.", min=1)] = 64_000,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=LAST_SEED)] = 1,
    device: Device = "auto",
    compiled: Compiled = False,
) -> None:
    """Train the teacher of the toy dataset in Stable Diffusion 3's own format, from nothing or from another teacher.

    First the autoencoder, then the transformer with its text encoders. The same command continues a run that was
    stopped, larger budgets continue a finished one; Ctrl-C stops it at the end of a step and keeps what was learnt.
    """
    from distill.worlds.scenes.captions import parse_task_weights

    weights = parse_task_weights(task_weights)
    if start is not None and coarse_images:
        raise ConfigError("--coarse-images: large patches are for a training from nothing; leave it or --start out")
    coarse = (660_000 if start is None else 0) if coarse_images is None else coarse_images
    if coarse >= images:
        raise ConfigError(f"--images {images}: the first {coarse} are on large patches; give more, or --coarse-images")

    from distill.cli.console import image_bar
    from distill.models.device import resolve_device
    from distill.training.run_lock import run_lock
    from distill.worlds.scenes.train import (
        TeacherRecipe,
        check_start,
        check_states,
        check_teacher_folder,
        copy_autoencoder,
        encode_scenes,
        train_teacher,
    )
    from distill.worlds.scenes.vae import VaeRecipe, train_vae

    where = resolve_device(device)
    recipe = TeacherRecipe(
        start=None if start is None else str(start),
        vae_images=26_000 if start is None and vae_images is None else vae_images,
        coarse_images=coarse,
        images=images,
        scenes=scenes,
        task_weights=weights,
        batch=batch,
        learning_rate=learning_rate,
        warmup=warmup,
        decay=decay,
        ema_half_life=ema_half_life,
        per_task=per_task,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    if start is not None:
        check_start(start)
    check_teacher_folder(recipe, out)
    with run_lock(out):
        check_states(recipe, out)  # before another autoencoder takes the place of the one that they were trained on
        if recipe.vae_images is not None:
            autoencoder = VaeRecipe(images=recipe.vae_images, seed=seed)
            train_with_bar("autoencoder", autoencoder.images, train_vae(autoencoder, out, where))
        elif start is not None:
            copy_autoencoder(start, out)
        with image_bar("scenes", scenes) as bar:
            for encoded in encode_scenes(recipe, out, where):
                bar.update(encoded)
        train_with_bar("teacher", images, train_teacher(recipe, out, where, compiled))
    typer.echo(f"The teacher is in {out}; `distill evaluate --teacher {out}` evaluates it.")


def show(
    out: Annotated[Path, typer.Option(help="Where the picture goes.", dir_okay=False)] = Path("runs/scenes.png"),
    count: Annotated[int, typer.Option(help="How many scenes.", min=1, max=4096)] = 32,
    seed: Annotated[int, typer.Option(help="Seed of prompts and scenes.", min=0, max=LAST_SEED)] = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="Combinations that training never sees.")] = False,
) -> None:
    """Write a grid of scenes with their prompts under them."""
    import numpy as np

    from distill.report.picture import labeled_grid, save_png
    from distill.worlds.scenes.captions import TASKS, evaluation_prompts, sample_prompt, wording
    from distill.worlds.scenes.render import place, render

    rng = np.random.default_rng(seed)
    if held_out:
        prompts = evaluation_prompts(-(-count // len(TASKS)), seed)[:count]
    else:
        prompts = [sample_prompt(rng) for _ in range(count)]
    images = render([place(prompt, rng) for prompt in prompts])
    save_png(labeled_grid([("scene", images)], [wording(prompt, rng) for prompt in prompts]), out)
    typer.echo(f"The grid is {out}.")
