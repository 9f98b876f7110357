"""`distill teacher` and `distill scenes show`: the small world that ships with the project."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Compiled, Device
from distill.cli.stopping import asked_to_stop, stopped


def teacher(
    out: Annotated[Path, typer.Option(help="Folder of the teacher and of its training state.")] = Path("runs/teacher"),
    vae_images: Annotated[int, typer.Option(help="Images that the autoencoder is trained on.")] = 26_000,
    images: Annotated[int, typer.Option(help="Images that the transformer is trained on.")] = 1_600_000,
    coarse_images: Annotated[int, typer.Option(help="How many of them, the first, on large patches.")] = 660_000,
    scenes: Annotated[int, typer.Option(help="Different scenes among them.")] = 40_960,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 1,
    device: Device = "auto",
    compiled: Compiled = False,
) -> None:
    """Train the small world's teacher from nothing, in Stable Diffusion 3's own format.

    First the autoencoder, then the transformer with its text encoders. The same command continues a run that was
    stopped, larger budgets continue a finished one; Ctrl-C stops it at the end of a step and keeps what was learnt.
    """
    from distill.checkpoint import claimed
    from distill.console import image_bar
    from distill.device import resolve_device
    from distill.scenes.train import TeacherRecipe, train_teacher
    from distill.scenes.vae import VaeRecipe, train_vae

    where = resolve_device(device)
    recipe = TeacherRecipe(images=images, coarse_images=coarse_images, scenes=scenes, seed=seed + 1)
    stages = [
        ("autoencoder", train_vae(VaeRecipe(images=vae_images, seed=seed), out, where)),
        ("teacher", train_teacher(recipe, out, where, compiled)),
    ]
    with claimed(out), asked_to_stop() as asked:
        for name, training in stages:
            with image_bar(name, vae_images if name == "autoencoder" else images) as bar:
                for progress in training:
                    bar.update(progress.images, progress.figures)
                    if asked:
                        progress.save()
                        raise stopped(progress.images, asked)
    typer.echo(f"The teacher is in {out}; `distill evaluate --teacher {out}` judges it.")


def show(
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("runs/scenes.png"),
    count: Annotated[int, typer.Option(help="How many scenes.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of prompts and scenes.")] = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="Combinations that training never sees.")] = False,
) -> None:
    """Write a grid of scenes with their prompts under them."""
    import numpy as np

    from distill.evaluate.picture import labelled_grid, save_png
    from distill.scenes.captions import TASKS, evaluation_prompts, sample_prompt, wording
    from distill.scenes.render import place, render

    rng = np.random.default_rng(seed)
    if held_out:
        prompts = evaluation_prompts(-(-count // len(TASKS)), seed)[:count]
    else:
        prompts = [sample_prompt(rng) for _ in range(count)]
    images = render([place(prompt, rng) for prompt in prompts])
    save_png(labelled_grid([("scene", images)], [wording(prompt, rng) for prompt in prompts]), out)
    typer.echo(f"The grid is {out}.")
