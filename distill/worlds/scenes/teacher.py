"""`distill teacher`: trains the teacher of the toy dataset in Stable Diffusion 3's own format.

The autoencoder (`vae.py`) is trained first. Then the transformer is trained together with two small CLIP text encoders
(`denoiser.py`) on latents that are encoded once (`latents.py`).

Training from random weights goes from coarse to fine. On large patches an image is 16 tokens, and the model learns
cheaply which words mean which colors and positions. Then the same blocks continue on small patches, 64 tokens, and
learn exact shapes. Training that starts from another teacher uses small patches only.
"""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTokenizer

from distill.errors import TeacherError
from distill.files import atomic_write_text
from distill.flow import noise
from distill.methods.policies import TeacherGuidance, guided_at
from distill.models.device import autocast
from distill.models.sd3 import decode_in_parts, sample
from distill.models.sd3_files import RECORD
from distill.models.sd3_folder import SD3Folder
from distill.models.vae import to_images
from distill.philox import key_of
from distill.training.state import TrainingProgress, check_folder, check_state
from distill.worlds.denoiser import Denoiser, TrainingData, fit, save_pipeline, tokenize
from distill.worlds.scenes.captions import Prompt, evaluation_prompts, vocabulary, wording
from distill.worlds.scenes.latents import SCENES, TOKENS, key_in, load_vae, read_scenes
from distill.worlds.scenes.recipe import ScenesRecipe
from distill.worlds.scenes.render import SIZE
from distill.worlds.scenes.score import score
from distill.worlds.scenes.vae import STATE as VAE_STATE
from distill.worlds.tokenizer import build_clip_tokenizer

T5_TOKENS = 0  # there is no T5; padding of its length would outweigh the 64 image tokens
COARSE, FINE = 4, 2  # sides of a patch, in latent pixels
CHANNELS = 4  # of the latents
GUIDANCE = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # candidates for the teacher's guidance scale
EVAL_BATCH = 256  # images


def make_denoiser(tokenizer: CLIPTokenizer, patch: int) -> Denoiser:
    """Build the untrained model; `patch` is the side of its patches."""
    return Denoiser(tokenizer, width=96, channels=CHANNELS, side=16, patch=patch, layers=4, heads=11, head_dim=16)


def check_start_folder(folder: Path) -> None:
    """Raise TeacherError unless training can start from a teacher folder: its image size, patches and vocabulary."""
    spec = SD3Folder.read(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    ours = build_clip_tokenizer(vocabulary(), TOKENS)
    if (spec.image_size, spec.patch_size, spec.latent_channels) != (SIZE, FINE, CHANNELS):
        raise TeacherError(
            f"{folder} makes images of {spec.image_size} pixels from {spec.latent_channels} channels on patches of "
            f"{spec.patch_size}, not {SIZE}, {CHANNELS} and {FINE}; start from a folder that `distill teacher` made"
        )
    if tokenizer.get_vocab() != ours.get_vocab():
        raise TeacherError(f"{folder} has another vocabulary; start from a folder that `distill teacher` made")


def check_teacher_folder(recipe: ScenesRecipe, folder: Path) -> None:
    """Raise OutputError if training would replace files of another program."""
    states = [_state_folder(folder, patch).name for patch in (COARSE, FINE)]
    if recipe.vae_images is not None:
        states.append(VAE_STATE)
    check_folder(folder, states, () if key_in(folder / SCENES) else (SCENES,))


def check_states(recipe: ScenesRecipe, folder: Path) -> None:
    """Raise CheckpointError when the transformer in this folder was trained with another recipe."""
    for patch in (COARSE, FINE):
        check_state(_state_folder(folder, patch), recipe)


def _state_folder(folder: Path, patch: int) -> Path:
    return folder / f"patch-{patch}-state"


def refine(coarse: Denoiser, fine: Denoiser) -> None:
    """Initialize a fine denoiser from a coarse one: each patch becomes four.

    The input projection of a fine patch is the mean over the four quadrants of the coarse one, times two, because a
    quarter of the pixels carries half of the norm. The output projection is the mean over the quadrants. Position
    embeddings stay the fine model's own; all other weights are copied.
    """
    ratio = COARSE // FINE
    w_in, w_out = "transformer.pos_embed.proj.weight", "transformer.proj_out."
    weights = coarse.state_dict()
    del weights["transformer.pos_embed.pos_embed"]
    quadrants = weights[w_in].unflatten(2, (ratio, FINE)).unflatten(4, (ratio, FINE))  # (width, C, y, FINE, x, FINE)
    weights[w_in] = ratio * quadrants.mean(dim=(2, 4))
    for name in (w_out + "weight", w_out + "bias"):
        quadrants = weights[name].unflatten(0, (ratio, FINE, ratio, FINE, CHANNELS))
        weights[name] = quadrants.mean(dim=(0, 2)).flatten(0, 2)
    fine.load_state_dict({**fine.state_dict(), **weights})


def train_teacher(
    recipe: ScenesRecipe, folder: Path, device: torch.device, compiled: bool = False, scales: Sequence[float] = GUIDANCE
) -> Iterator[TrainingProgress]:
    """Train to the budget, continuing from the folder's states. The autoencoder and the encoded scenes must exist.

    At the end `folder` holds the whole pipeline in the layout of `StableDiffusion3Pipeline`, with EMA weights. Its
    record names the guidance of `scales` that scores highest on seen prompts; held-out prompts are not used for that.
    """
    torch.manual_seed(key_of(recipe.seed, "weights"))
    vae = load_vae(recipe, folder, device)
    tokenizer = build_clip_tokenizer(vocabulary(), TOKENS)
    scenes = read_scenes(recipe, folder, vae, device)
    null = tokenize(tokenizer, [""])[0].to(device)
    held_out, seen = (evaluation_prompts(recipe.per_task, seed=0, held_out=split) for split in (True, False))

    def evaluate(prompts: Sequence[Prompt], guidance: float, steps: int) -> dict[str, float]:
        rng = np.random.default_rng(0)
        ids = tokenize(tokenizer, [wording(prompt, rng) for prompt in prompts]).to(device)
        return score(prompts, generate(average, vae, ids, null, guidance, steps))

    average: Any = None
    data = TrainingData(scenes.sample, null)
    stages = [(COARSE, range(recipe.coarse_images)), (FINE, range(recipe.coarse_images, recipe.images))]
    for patch, stage in stages if recipe.coarse_images else stages[1:]:
        model = make_denoiser(tokenizer, patch)
        if average is not None:
            refine(average, model)
        elif recipe.start is not None:
            model.start_from(Path(recipe.start))
        model.to(device)
        average = deepcopy(model)
        for progress in fit(model, average, data, recipe, _state_folder(folder, patch), stage, compiled):
            if progress.images >= stage.stop or progress.crosses(recipe.evaluate_every):
                progress.metrics.update(evaluate(held_out, 2.5, 16))
            yield progress

    save_pipeline(average, vae, tokenizer, folder)
    scores = [evaluate(seen, scale, 28)["overall"] for scale in scales]
    record = {
        "max_sequence_length": T5_TOKENS,
        "guidance": scales[int(np.argmax(scores))],
        "recipe": recipe.model_dump(),
    }
    atomic_write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


@torch.no_grad()
def generate(
    model: Denoiser, vae: AutoencoderKL, ids: Tensor, null: Tensor, guidance: float, steps: int
) -> NDArray[np.uint8]:
    """Generate images (N, 64, 64, 3) for token ids (N, TOKENS); `null` (TOKENS,) holds the ids of the empty caption."""
    images = []
    for start in range(0, len(ids), EVAL_BATCH):
        part = ids[start : start + EVAL_BATCH]
        z = noise(range(start, start + len(part)), (CHANNELS, SIZE // 4, SIZE // 4)).to(ids.device)
        with autocast(ids.device):
            velocity = guided_at(TeacherGuidance(scale=guidance), model.velocity, model.encode(null[None]), guidance)
            latents = sample(velocity, z, model.encode(part), steps)
        images.append(to_images(decode_in_parts(vae, latents)))
    return np.concatenate(images)
