"""`distill teacher` and `distill scenes show`: teacher and images of the toy dataset."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import LAST_SEED, Compiled, Device, Overrides
from distill.cli.stopping import train_with_bar


def teacher(
    out: Annotated[Path, typer.Option(help="Folder of teacher and state.", file_okay=False)] = Path("runs/teacher"),
    overrides: Overrides = None,
    device: Device = "auto",
    compiled: Compiled = False,
) -> None:
    """Train the teacher of the toy dataset in Stable Diffusion 3's format, from random weights or from a teacher.

    The autoencoder is trained first, then the transformer with its text encoders. Run the same command again to resume.
    Larger budgets continue a finished training. Ctrl-C stops after the current step and saves its state. The keys of
    `--set` are in docs/distill.md.
    """
    from distill.config import read_group
    from distill.worlds.scenes.recipe import ScenesRecipe

    recipe = read_group(ScenesRecipe, overrides or [])

    from distill.cli.console import image_bar
    from distill.models.device import resolve_device
    from distill.training.run_lock import run_lock
    from distill.worlds.scenes.latents import encode_scenes
    from distill.worlds.scenes.teacher import check_start_folder, check_states, check_teacher_folder, train_teacher
    from distill.worlds.scenes.vae import VaeRecipe, train_vae

    where = resolve_device(device)
    if recipe.start is not None:
        check_start_folder(Path(recipe.start))
    check_teacher_folder(recipe, out)
    with run_lock(out):
        check_states(recipe, out)  # before their autoencoder is replaced
        if recipe.vae_images is not None:
            autoencoder = VaeRecipe(images=recipe.vae_images, seed=recipe.seed)
            train_with_bar("autoencoder", autoencoder.images, train_vae(autoencoder, out, where))
        with image_bar("scenes", recipe.scenes) as bar:
            for encoded in encode_scenes(recipe, out, where):
                bar.update(encoded)
        train_with_bar("teacher", recipe.images, train_teacher(recipe, out, where, compiled))
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
