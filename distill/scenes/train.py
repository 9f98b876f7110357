"""`distill teacher`: the world's teacher in Stable Diffusion 3's own format, trained from nothing.

First the autoencoder (`vae.py`), then the transformer together with two small CLIP text encoders (`denoiser.py`), on
latents that are encoded once.

The transformer learns coarse to fine: on large patches, where an image is 16 tokens and cheap, it learns which words
mean which colours and places; then the same blocks go on with small patches, 64 tokens, and learn exact shapes.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from distill.denoiser import Denoiser, Recipe, averaged, fit, save_pipeline, tokenize
from distill.files import aside
from distill.flow import noise
from distill.scenes.captions import Prompt, evaluation_prompts, sample_prompt, vocabulary, wording
from distill.scenes.render import place, render
from distill.scenes.score import score
from distill.scenes.vae import Progress, encode_mean, to_images
from distill.teacher import decode_latents, guided, sample
from distill.tokenizer import build_clip_tokenizer

TOKENS = 16  # CLIP tokens of a prompt, start and end included
T5_TOKENS = 0  # tokens of the absent T5: none, so that text does not outweigh the 64 image tokens
COARSE, FINE = 4, 2  # sides of a patch, in latent pixels
CHANNELS = 4  # of the latents
GUIDANCE = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # scales that the teacher's own is chosen from


@dataclass(frozen=True)
class TeacherRecipe(Recipe):
    """How the transformer and its text encoders are trained; `images` of which the first `coarse_images` are coarse."""

    images: int = 1_600_000
    coarse_images: int = 660_000
    scenes: int = 40_960
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    caption_dropout: float = 0.1
    time_mean: float = 0.4
    time_std: float = 1.2
    ema: float = 0.999
    per_task: int = 32  # prompts of each task that it is judged by on the way, and that choose its guidance
    seed: int = 2


def make_denoiser(tokenizer: CLIPTokenizer, patch: int) -> Denoiser:
    """The world's model, untrained, on patches of a side."""
    return Denoiser(
        tokenizer,
        width=96,
        layers=2,
        transformer={
            "sample_size": 16,
            "patch_size": patch,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 4,
            "num_attention_heads": 11,
            "attention_head_dim": 16,
            "caption_projection_dim": 176,
            "pos_embed_max_size": 8,
        },
    )


def scene_latents(
    vae: AutoencoderKL, recipe: TeacherRecipe, folder: Path, device: torch.device
) -> tuple[list[Prompt], Tensor]:
    """The training scenes' prompts and scaled latents (N, 4, 16, 16), encoded once and kept in the folder."""
    rng = np.random.default_rng((recipe.seed, recipe.scenes))
    prompts = [sample_prompt(rng) for _ in range(recipe.scenes)]
    path = folder / f"latents-{recipe.seed}-{recipe.scenes}.safetensors"
    if not path.exists():
        parts = []
        for start in range(0, recipe.scenes, 1024):
            images = render([place(prompt, rng) for prompt in prompts[start : start + 1024]])
            parts.append(encode_mean(vae, images, device))
        latents = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
        with aside(path) as made:
            save_file({"latents": latents.contiguous()}, made)
    return prompts, load_file(path)["latents"]


def refine(coarse: Denoiser, fine: Denoiser) -> None:
    """Start a fine denoiser from a coarse one's weights: each patch is cut into four.

    A fine patch enters by the mean of its coarse patch's four quadrants (twice, since a quarter of the pixels carries
    half of the norm) and leaves as the mean of what they were; positions are its own, all else is kept.
    """
    ratio = COARSE // FINE
    into, out = "transformer.pos_embed.proj.weight", "transformer.proj_out."
    weights = coarse.state_dict()
    del weights["transformer.pos_embed.pos_embed"]
    quadrants = weights[into].unflatten(2, (ratio, FINE)).unflatten(4, (ratio, FINE))  # (width, C, y, FINE, x, FINE)
    weights[into] = ratio * quadrants.mean(dim=(2, 4))
    for name in (out + "weight", out + "bias"):
        quadrants = weights[name].unflatten(0, (ratio, FINE, ratio, FINE, CHANNELS))
        weights[name] = quadrants.mean(dim=(0, 2)).flatten(0, 2)
    fine.load_state_dict({**fine.state_dict(), **weights})


def train_teacher(
    recipe: TeacherRecipe,
    folder: Path,
    device: torch.device,
    compiled: bool = True,
    scales: Sequence[float] = GUIDANCE,
) -> Iterator[Progress]:
    """Train until the budget is seen, continuing from the folder's states; needs `folder/vae`.

    At the end `folder` holds the whole pipeline in `StableDiffusion3Pipeline`'s own layout, with EMA weights, and names
    the guidance of `scales` that scores highest.
    """
    torch.manual_seed(recipe.seed)
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device).eval()
    tokenizer = build_clip_tokenizer(vocabulary(), TOKENS)
    prompts, latents = scene_latents(vae, recipe, folder, device)

    def sample_scenes(rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        rows = rng.integers(len(prompts), size=recipe.batch)
        dropped = rng.random(recipe.batch) < recipe.caption_dropout
        texts = ["" if drop else wording(prompts[i], rng) for i, drop in zip(rows, dropped, strict=True)]
        return latents[torch.from_numpy(rows)], texts

    best: Any = None
    for patch, first, last in ((COARSE, 0, recipe.coarse_images), (FINE, recipe.coarse_images, recipe.images)):
        model = make_denoiser(tokenizer, patch)
        if best is not None:
            refine(best, model)
        model.to(device)
        average = averaged(model, recipe.ema)
        best = average.module
        state = folder / f"patch-{patch}-state"
        for progress in fit(model, average, tokenizer, sample_scenes, recipe, state, device, compiled, first, last):
            if progress.images >= last or progress.images // recipe.batch % 1000 == 0:
                progress.figures.update(quick_score(best, vae, tokenizer, device, 2.5, recipe.per_task, True, 16))
            yield progress

    save_pipeline(best, vae, tokenizer, folder)
    record = {
        "max_sequence_length": T5_TOKENS,
        "guidance": best_guidance(best, vae, tokenizer, recipe.per_task, device, scales),
    }
    (folder / "onestep.json").write_text(json.dumps({**record, "recipe": asdict(recipe)}, indent=2) + "\n")


@torch.no_grad()
def generate(
    model: Denoiser,
    vae: AutoencoderKL,
    ids: Tensor,
    null: Tensor,
    guidance: float,
    steps: int,
    device: torch.device,
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Images (N, 64, 64, 3) for token ids (N, TOKENS), seeds 0 to N - 1."""
    z = noise(range(len(ids)), (CHANNELS, 16, 16)).to(device)
    cond, empty = model.encode(ids.to(device)), model.encode(null.to(device))
    latents = sample(guided(model.velocity, empty, guidance), z, cond, steps)
    return to_images(decode_latents(vae, latents))


def quick_score(
    model: Denoiser,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    device: torch.device,
    guidance: float,
    per_task: int,
    held_out: bool,
    steps: int,
) -> dict[str, float]:
    """Score per task of guided samples."""
    prompts = evaluation_prompts(per_task, seed=0, held_out=held_out)
    rng = np.random.default_rng(0)
    ids = tokenize(tokenizer, [wording(prompt, rng) for prompt in prompts])
    return score(prompts, generate(model, vae, ids, tokenize(tokenizer, [""]), guidance, steps, device))


def best_guidance(
    model: Denoiser,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    per_task: int,
    device: torch.device,
    scales: Sequence[float],
) -> float:
    """The guidance scale of the highest score on prompts that training saw; the held-out ones stay untouched."""
    scores = [quick_score(model, vae, tokenizer, device, g, per_task, False, 28)["overall"] for g in scales]
    return scales[int(np.argmax(scores))]
