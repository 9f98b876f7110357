"""`distill cifar10 teacher`: a pixel-space teacher of CIFAR-10 in Stable Diffusion 3's own format, from nothing.

An MM-DiT of the size of the U-Nets that are usual for these images. Text is one word an image: its class, or the same
word for all.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from distill.cifar10.data import ANY, CLASSES, SIDE, captions, read_images
from distill.denoiser import Denoiser, Recipe, averaged, fit, save_pipeline
from distill.files import write_aside
from distill.identity import identity_autoencoder
from distill.scenes.vae import Progress, to_pixels
from distill.spec import RECORD
from distill.tokenizer import build_clip_tokenizer

PROMPTS = "prompts.txt"  # in the teacher's folder: all there is to ask for
TOKENS = 3  # of a prompt: a word, start and end
HEAD = 64  # channels of an attention head


@dataclass(frozen=True)
class TeacherRecipe(Recipe):
    """How it is trained: 400 000 steps on a GPU, mirrored images among them."""

    conditional: bool = False
    layers: int = 12
    heads: int = 6
    images: int = 51_200_000
    batch: int = 128
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    caption_dropout: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.0
    ema: float = 0.9999
    seed: int = 1


def train_teacher(
    data: Path, recipe: TeacherRecipe, folder: Path, device: torch.device, compiled: bool = False
) -> Iterator[Progress]:
    """Train on the images in `data` until the budget is seen, continuing from the folder's state.

    At the end `folder` holds the whole pipeline, with EMA weights, and its prompts beside it. Raises ImageError for
    data that is not CIFAR-10's.
    """
    images, labels = read_images(data)
    texts = captions(labels, recipe.conditional)
    pixels = to_pixels(images)
    shift, scale = float(pixels.mean()), float(1 / pixels.std())
    vae = identity_autoencoder(SIDE, shift, scale)
    latents = (pixels - shift) * scale  # (N, 3, 32, 32)

    torch.manual_seed(recipe.seed)
    tokenizer = build_clip_tokenizer([ANY, *CLASSES], TOKENS)
    model = _denoiser(recipe, tokenizer).to(device)
    average = averaged(model, recipe.ema)

    def sample(rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        rows = rng.integers(len(texts), size=recipe.batch)
        dropped = rng.random(recipe.batch) < recipe.caption_dropout
        mirrored = torch.from_numpy(rng.random(recipe.batch) < 0.5).view(-1, 1, 1, 1)
        x_0 = latents[torch.from_numpy(rows)]
        words = ["" if drop else texts[i] for i, drop in zip(rows, dropped, strict=True)]
        return torch.where(mirrored, x_0.flip(3), x_0), words

    yield from fit(model, average, tokenizer, sample, recipe, folder / "state", device, compiled)
    save_pipeline(average.module, vae, tokenizer, folder)
    write_aside(folder / PROMPTS, "".join(f"{word}\n" for word in (CLASSES if recipe.conditional else (ANY,))))
    record = {"max_sequence_length": 0, "guidance": 1.0, "recipe": asdict(recipe)}
    write_aside(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _denoiser(recipe: TeacherRecipe, tokenizer: CLIPTokenizer) -> Denoiser:
    return Denoiser(
        tokenizer,
        width=64,
        layers=2,
        transformer={
            "sample_size": SIDE,
            "patch_size": 2,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "attention_head_dim": HEAD,
            "caption_projection_dim": recipe.heads * HEAD,
            "pos_embed_max_size": SIDE // 2,
        },
    )
