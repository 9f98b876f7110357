"""`distill cifar10 teacher`: trains a pixel-space teacher of CIFAR-10 in Stable Diffusion 3's own format.

The model is an MM-DiT of the size of the usual U-Nets for these images. A caption is one word: the image's class, or
the same word for all images.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from distill.files import atomic_write_text
from distill.models.sd3_files import RECORD
from distill.models.vae import to_pixels
from distill.philox import Draw, key_of
from distill.training.state import TrainingProgress, check_folder
from distill.worlds.cifar10.data import ANY, CLASSES, SIDE, captions, read_images
from distill.worlds.cifar10.recipe import Cifar10Recipe
from distill.worlds.denoiser import Denoiser, TrainingData, fit, save_pipeline, tokenize
from distill.worlds.identity import identity_autoencoder
from distill.worlds.tokenizer import build_clip_tokenizer

PROMPTS = "prompts.txt"  # in the teacher's folder: every possible prompt
STATE = "state"  # in the teacher's folder: the state that training resumes from
TOKENS = 3  # of a prompt: start, one word, end


def check_teacher_folder(folder: Path) -> None:
    """Raise OutputError if training would replace files of another program."""
    check_folder(folder, (STATE,), (PROMPTS,))


def train_teacher(
    data: Path, recipe: Cifar10Recipe, folder: Path, device: torch.device, compiled: bool = False
) -> Iterator[TrainingProgress]:
    """Train on the images in `data` to the budget, continuing from the folder's state.

    At the end `folder` holds the whole pipeline with EMA weights, and a file of its prompts. Raises ImageError if
    `data` is not CIFAR-10.
    """
    images, labels = read_images(data)
    pixels = to_pixels(images)
    shift, scale = float(pixels.mean()), float(1 / pixels.std())
    vae = identity_autoencoder(SIDE, shift, scale)

    torch.manual_seed(key_of(recipe.seed, "weights"))
    tokenizer = build_clip_tokenizer([ANY, *CLASSES], TOKENS)
    model = Denoiser(
        tokenizer, width=64, channels=3, side=SIDE, patch=2, layers=recipe.layers, heads=recipe.heads, head_dim=64
    ).to(device)
    average = deepcopy(model)
    latents = ((pixels - shift) * scale).to(device)  # (N, 3, 32, 32)
    ids = tokenize(tokenizer, captions(labels, recipe.conditional)).to(device)
    null = tokenize(tokenizer, [""])[0].to(device)

    def sample(draw: Draw) -> tuple[Tensor, Tensor]:
        rows = draw.integers(len(latents))
        x_0 = latents.index_select(0, rows)
        mirrored = (draw.uniform() < 0.5).view(-1, 1, 1, 1)
        return torch.where(mirrored, x_0.flip(3), x_0), ids.index_select(0, rows)

    yield from fit(model, average, TrainingData(sample, null), recipe, folder / STATE, range(recipe.images), compiled)
    save_pipeline(average, vae, tokenizer, folder)
    atomic_write_text(folder / PROMPTS, "".join(f"{word}\n" for word in (CLASSES if recipe.conditional else (ANY,))))
    record = {"max_sequence_length": 0, "guidance": 1.0, "recipe": recipe.model_dump()}
    atomic_write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
