"""Training scenes of the toy dataset, encoded once: scaled latents, and token ids of their captions."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from distill.errors import CacheError
from distill.files import atomic_write
from distill.models.device import fast_bfloat16
from distill.models.tensor_file import write_tensors
from distill.models.weights import check_finite
from distill.philox import Draw
from distill.worlds.denoiser import tokenize
from distill.worlds.scenes.captions import vocabulary
from distill.worlds.scenes.data import WORDINGS, make_chunks
from distill.worlds.scenes.recipe import ScenesRecipe
from distill.worlds.scenes.vae import encode_mean
from distill.worlds.tokenizer import build_clip_tokenizer

TOKENS = 16  # CLIP tokens of a prompt, start and end included
SCENES = "scenes.safetensors"  # in the teacher's folder: latents and token ids of the training scenes
FORMAT = 1  # of that file; increase it when the same recipe renders other scenes


@dataclass(frozen=True)
class Scenes:
    """Training scenes on the device: scaled latents (N, 4, 16, 16), and token ids (N, WORDINGS, TOKENS)."""

    latents: Tensor
    ids: Tensor

    def sample(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Draw a scene for each image of a batch, with one of its captions."""
        wordings = self.ids.flatten(0, 1)
        drawn = draw.integers(len(wordings))
        return self.latents.index_select(0, drawn // WORDINGS), wordings.index_select(0, drawn)


def encode_scenes(
    recipe: ScenesRecipe, folder: Path, device: torch.device, processes: int | None = None
) -> Iterator[int]:
    """Render and encode the training scenes, unless they are there; yield the count."""
    vae = load_vae(recipe, folder, device)
    key = _key(recipe, vae, device)
    if key_in(folder / SCENES) == key:
        return
    parts, texts = [], []
    for chunk in make_chunks(recipe.seed, recipe.scenes, recipe.task_weights, processes):
        parts.append(encode_mean(vae, chunk.images, device).cpu())
        texts += chunk.texts
        yield len(texts) // WORDINGS
    latents = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
    ids = tokenize(build_clip_tokenizer(vocabulary(), TOKENS), texts).view(-1, WORDINGS, TOKENS)
    with atomic_write(folder / SCENES) as partial:
        write_tensors(partial, {"latents": latents, "ids": ids}, metadata={"key": key})


def read_scenes(recipe: ScenesRecipe, folder: Path, vae: AutoencoderKL, device: torch.device) -> Scenes:
    """Read the encoded scenes of a folder. Raises CacheError unless they match the recipe and the autoencoder."""
    path = folder / SCENES
    if key_in(path) != _key(recipe, vae, device):
        raise CacheError(f"{path} is missing, or its scenes belong to another recipe or autoencoder; encode them first")
    return Scenes(**load_file(path, device=str(device)))


def load_vae(recipe: ScenesRecipe, folder: Path, device: torch.device) -> AutoencoderKL:
    """Load the folder's autoencoder, or that of `recipe.start`. Raises TeacherError for weights that are not finite."""
    path = (folder if recipe.vae_images is not None else Path(str(recipe.start))) / "vae"
    vae = AutoencoderKL.from_pretrained(path, use_safetensors=True, local_files_only=True)
    check_finite(vae, path)
    return vae.to(device).eval()


def _key(recipe: ScenesRecipe, vae: AutoencoderKL, device: torch.device) -> str:
    """Return the cache key: everything that encoded scenes depend on."""
    weights = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    values = {
        "format": FORMAT,
        "seed": recipe.seed,
        "scenes": recipe.scenes,
        "task_weights": recipe.task_weights,
        "wordings": WORDINGS,
        "tokens": TOKENS,
        "autoencoder": weights.hexdigest(),
        "shift_and_scale": (vae.config.shift_factor, vae.config.scaling_factor),
        "bf16": fast_bfloat16(device),
    }
    return json.dumps(values, sort_keys=True)


def key_in(path: Path) -> str | None:
    """The key of a file of encoded scenes; None for another file, or none."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("key"))
    except SafetensorError:
        return None
