"""`distill teacher` and `distill scenes show`: teacher and images of the toy dataset."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import LAST_SEED, Compiled, Device, finite
from distill.cli.stopping import train_with_bar
from distill.errors import ConfigError

_START = "Teacher folder that training starts from. Its autoencoder is copied."
_VAE = "Training images of the autoencoder. Default: 26000, or none with --start."
_COARSE = "Number of first images on large patches. Default: 660000, or none with --start."
_WEIGHTS = "Shares of the tasks in the scenes, as task=number,...; other tasks get 0. Default: equal shares."
_DECAY = "Last images, over which the learning rate falls linearly to 2 % of its peak."


def teacher(
    out: Annotated[Path, typer.Option(help="Folder of teacher and state.", file_okay=False)] = Path("runs/teacher"),
    start: Annotated[Path | None, typer.Option(help=_START)] = None,
    images: Annotated[int, typer.Option(help="Training images of the transformer.", min=1)] = 1_600_000,
    coarse_images: Annotated[int | None, typer.Option(help=_COARSE, min=0)] = None,
    vae_images: Annotated[int | None, typer.Option(help=_VAE, min=1)] = None,
    scenes: Annotated[int, typer.Option(help="Number of distinct scenes.", min=1)] = 40_960,
    task_weights: Annotated[str | None, typer.Option(help=_WEIGHTS)] = None,
    batch: Annotated[int, typer.Option(help="Batch size.", min=1)] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", min=0, max=1, callback=finite)] = 1e-3,
    warmup: Annotated[int, typer.Option(help="First images, over which the learning rate rises.", min=0)] = 19_200,
    decay: Annotated[int, typer.Option(help=_DECAY, min=0)] = 400_000,
    ema_half_life: Annotated[
        int, typer.Option(help="Half-life of the EMA in images, at most 0.1 of the images so far.", min=1)
    ] = 44_000,
    per_task: Annotated[int, typer.Option(help="Prompts per task in an evaluation.", min=1)] = 32,
    evaluate_every: Annotated[int, typer.Option(help="Images between evaluations.", min=1)] = 64_000,
    checkpoint_every: Annotated[int, typer.Option(help="Images between saved states.", min=1)] = 64_000,
    seed: Annotated[int, typer.Option(help="Random seed.", min=0, max=LAST_SEED)] = 1,
    device: Device = "auto",
    compiled: Compiled = False,
) -> None:
    """Train the teacher of the toy dataset in Stable Diffusion 3's format, from random weights or from a teacher.

    The autoencoder is trained first, then the transformer with its text encoders. Run the same command again to resume.
    Larger budgets continue a finished training. Ctrl-C stops after the current step and saves its state.
    """
    from distill.worlds.scenes.captions import parse_task_weights

    weights = parse_task_weights(task_weights)
    if start is not None and coarse_images:
        raise ConfigError("--coarse-images: training with --start has no large patches; remove one of the two options")
    coarse = (660_000 if start is None else 0) if coarse_images is None else coarse_images
    if coarse >= images:
        raise ConfigError(f"--images {images}: {coarse} images are on large patches; raise it or lower --coarse-images")

    from distill.cli.console import image_bar
    from distill.models.device import resolve_device
    from distill.training.run_lock import run_lock
    from distill.worlds.scenes.latents import encode_scenes
    from distill.worlds.scenes.recipe import ScenesRecipe
    from distill.worlds.scenes.teacher import (
        check_start_folder,
        check_states,
        check_teacher_folder,
        copy_autoencoder,
        train_teacher,
    )
    from distill.worlds.scenes.vae import VaeRecipe, train_vae

    where = resolve_device(device)
    recipe = ScenesRecipe(
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
        check_start_folder(start)
    check_teacher_folder(recipe, out)
    with run_lock(out):
        check_states(recipe, out)  # before their autoencoder is replaced
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
    out: Annotated[Path, typer.Option(help="PNG file to write.", dir_okay=False)] = Path("runs/scenes.png"),
    count: Annotated[int, typer.Option(help="Number of scenes.", min=1, max=4096)] = 32,
    seed: Annotated[int, typer.Option(help="Random seed.", min=0, max=LAST_SEED)] = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="Use held-out combinations.")] = False,
) -> None:
    """Write a grid of scenes with their prompts."""
    import numpy as np

    from distill.report.grid import labeled_grid, save_png
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
