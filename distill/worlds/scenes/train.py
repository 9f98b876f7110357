"""`distill teacher`: the teacher of the toy dataset in Stable Diffusion 3's own format.

First the autoencoder (`vae.py`), then the transformer together with two small CLIP text encoders (`denoiser.py`), on
latents that are encoded once.

A transformer that is trained from nothing learns coarse to fine: on large patches, where an image is 16 tokens and
cheap, it learns which words mean which colors and places; then the same blocks continue with small patches, 64 tokens,
and learn exact shapes. One that starts from another teacher has learnt this already.
"""

import filecmp
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from distill.errors import CacheError, TeacherError
from distill.files import atomic_write, atomic_write_text
from distill.flow import noise
from distill.models.device import autocast, fast_bfloat16
from distill.models.sd3 import decode_in_parts, guided, sample
from distill.models.sd3_folder import RECORD, SD3Folder
from distill.models.vae import to_images
from distill.models.weights import check_finite
from distill.philox import Draw, key_of
from distill.training.state import Progress, check_folder, check_state
from distill.worlds.denoiser import Denoiser, Recipe, fit, save_pipeline, tokenize
from distill.worlds.scenes.captions import Prompt, evaluation_prompts, vocabulary, wording
from distill.worlds.scenes.data import WORDINGS, make_chunks
from distill.worlds.scenes.render import SIZE
from distill.worlds.scenes.score import score
from distill.worlds.scenes.vae import STATE as VAE_STATE
from distill.worlds.scenes.vae import encode_mean
from distill.worlds.tokenizer import build_clip_tokenizer

TOKENS = 16  # CLIP tokens of a prompt, start and end included
T5_TOKENS = 0  # tokens of the absent T5: none, so that text does not outweigh the 64 image tokens
COARSE, FINE = 4, 2  # sides of a patch, in latent pixels
CHANNELS = 4  # of the latents
GUIDANCE = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # scales that the teacher's own is chosen from
SCENES = "scenes.safetensors"  # in the teacher's folder: latents and token ids of the training scenes
FORMAT = 1  # of that file; to be raised when other scenes are rendered for the same recipe
AT_ONCE = 256  # images that an evaluation samples


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe(Recipe):
    """How the transformer and its text encoders are trained, and on what.

    The first `coarse_images` of `images` are on large patches. `start` is the teacher folder that it starts from.
    `vae_images` None is that teacher's autoencoder. The tasks' shares of the scenes are `task_weights`. `per_task`
    prompts of each task are sampled by each evaluation, and to choose the guidance scale.
    """

    start: str | None
    vae_images: int | None
    coarse_images: int
    scenes: int
    task_weights: dict[str, float]
    per_task: int
    evaluate_every: int
    time_mean: float = 0.4
    time_std: float = 1.2


@dataclass(frozen=True)
class Scenes:
    """Training scenes on the device: scaled latents (N, 4, 16, 16), and token ids (N, WORDINGS, TOKENS)."""

    latents: Tensor
    ids: Tensor

    def sample(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """A scene for each image of a batch, in one of its wordings."""
        wordings = self.ids.flatten(0, 1)
        drawn = draw.integers(len(wordings))
        return self.latents.index_select(0, drawn // WORDINGS), wordings.index_select(0, drawn)


@dataclass(frozen=True)
class EvalPrompts:
    """Prompts of an evaluation, with token ids (N, TOKENS)."""

    prompts: list[Prompt]
    ids: Tensor


def make_denoiser(tokenizer: CLIPTokenizer, patch: int) -> Denoiser:
    """The untrained model, on patches of a side."""
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


def check_start(folder: Path) -> None:
    """Raise TeacherError unless a teacher folder can be started from: 64x64 images on small patches, our vocabulary."""
    spec = SD3Folder.read(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    ours = build_clip_tokenizer(vocabulary(), TOKENS)
    if (spec.image_size, spec.patch_size, spec.latent_channels) != (SIZE, FINE, CHANNELS):
        raise TeacherError(
            f"{folder} makes images of {spec.image_size} pixels from {spec.latent_channels} channels on patches of "
            f"{spec.patch_size}, not {SIZE}, {CHANNELS} and {FINE}; start from a folder that `distill teacher` made"
        )
    if tokenizer.get_vocab() != ours.get_vocab():
        raise TeacherError(f"{folder} has other words; start from a folder that `distill teacher` made")


def check_teacher_folder(recipe: TeacherRecipe, folder: Path) -> None:
    """Raise OutputError if training would replace files that it did not write."""
    states = [_state_folder(folder, patch).name for patch in (COARSE, FINE)]
    if recipe.vae_images is not None:
        states.append(VAE_STATE)
    elif recipe.start is not None and _holds_autoencoder(folder, Path(recipe.start)):
        return  # training stopped after the copy, before its first state
    check_folder(folder, states, (SCENES,))


def _holds_autoencoder(folder: Path, start: Path) -> bool:
    """Whether the folder has a copy of a teacher's autoencoder, and no pipeline yet."""
    if (folder / "model_index.json").exists() or not (folder / "vae").is_dir():
        return False
    names = {path.name for path in (start / "vae").iterdir() if path.is_file()}
    if names != {path.name for path in (folder / "vae").iterdir()}:
        return False
    return all(filecmp.cmp(start / "vae" / name, folder / "vae" / name, shallow=False) for name in names)


def copy_autoencoder(start: Path, folder: Path) -> None:
    """Copy a teacher's autoencoder; what is copied can be written, whatever the original allows."""
    with atomic_write(folder / "vae") as made:
        made.mkdir()
        for path in (start / "vae").iterdir():
            if path.is_file():
                shutil.copyfile(path, made / path.name)


def encode_scenes(
    recipe: TeacherRecipe, folder: Path, device: torch.device, processes: int | None = None
) -> Iterator[int]:
    """Render the training scenes and encode them by `folder/vae` into the folder, unless it has them; yields how many.

    Several processes render while this one encodes.
    """
    vae = _load_vae(folder, device)
    key = _key(recipe, vae, device)
    if _key_in(folder / SCENES) == key:
        return
    parts, texts = [], []
    for chunk in make_chunks(recipe.seed, recipe.scenes, recipe.task_weights, processes):
        parts.append(encode_mean(vae, chunk.images, device).cpu())
        texts += chunk.texts
        yield len(texts) // WORDINGS
    latents = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
    ids = tokenize(build_clip_tokenizer(vocabulary(), TOKENS), texts).view(-1, WORDINGS, TOKENS)
    with atomic_write(folder / SCENES) as made:
        save_file({"latents": latents.contiguous(), "ids": ids}, made, {"key": key})


def read_scenes(recipe: TeacherRecipe, folder: Path, vae: AutoencoderKL, device: torch.device) -> Scenes:
    """The encoded scenes of a folder. Raises CacheError unless they are those of the recipe and the autoencoder."""
    path = folder / SCENES
    if _key_in(path) != _key(recipe, vae, device):
        raise CacheError(f"{path} is missing, or its scenes are of another recipe or autoencoder; encode them first")
    return Scenes(**load_file(path, device=str(device)))


def check_states(recipe: TeacherRecipe, folder: Path) -> None:
    """Raise CheckpointError when the transformer has been trained here by another recipe."""
    for patch in (COARSE, FINE):
        check_state(_state_folder(folder, patch), recipe)


def _state_folder(folder: Path, patch: int) -> Path:
    return folder / f"patch-{patch}-state"


def _load_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True, local_files_only=True)
    check_finite(vae, folder / "vae")
    return vae.to(device).eval()


def _key(recipe: TeacherRecipe, vae: AutoencoderKL, device: torch.device) -> str:
    """Everything that encoded scenes depend on."""
    weights = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    determined = {
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
    return json.dumps(determined, sort_keys=True)


def _key_in(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("key"))
    except SafetensorError:
        return None  # damaged: the scenes are encoded again


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
    compiled: bool = False,
    scales: Sequence[float] = GUIDANCE,
) -> Iterator[Progress]:
    """Train until the budget is seen, continuing from the folder's states; needs `folder/vae` and its encoded scenes.

    At the end `folder` holds the whole pipeline in `StableDiffusion3Pipeline`'s own layout, with averaged weights, and
    names the guidance of `scales` that scores highest on prompts that training saw; held-out ones stay untouched.
    """
    torch.manual_seed(key_of(recipe.seed, "weights"))
    vae = _load_vae(folder, device)
    tokenizer = build_clip_tokenizer(vocabulary(), TOKENS)
    scenes = read_scenes(recipe, folder, vae, device)
    null = tokenize(tokenizer, [""])[0].to(device)
    held_out, seen = (_eval_prompts(tokenizer, recipe.per_task, side, device) for side in (True, False))

    best: Any = None
    stages = [(COARSE, 0, recipe.coarse_images), (FINE, recipe.coarse_images, recipe.images)]
    for patch, first, last in stages if recipe.coarse_images else stages[1:]:
        model = make_denoiser(tokenizer, patch)
        if best is not None:
            refine(best, model)
        elif recipe.start is not None:
            model.start_from(Path(recipe.start))
        model.to(device)
        best = deepcopy(model)
        state = _state_folder(folder, patch)
        for progress in fit(model, best, scenes.sample, null, recipe, state, device, compiled, first, last):
            if progress.images >= last or progress.crosses(recipe.evaluate_every):
                progress.metrics.update(evaluate(best, vae, held_out, null, 2.5, 16))
            yield progress

    save_pipeline(best, vae, tokenizer, folder)
    scores = [evaluate(best, vae, seen, null, scale, 28)["overall"] for scale in scales]
    record = {"max_sequence_length": T5_TOKENS, "guidance": scales[int(np.argmax(scores))], "recipe": asdict(recipe)}
    atomic_write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _eval_prompts(tokenizer: CLIPTokenizer, per_task: int, held_out: bool, device: torch.device) -> EvalPrompts:
    prompts = evaluation_prompts(per_task, seed=0, held_out=held_out)
    rng = np.random.default_rng(0)
    return EvalPrompts(prompts, tokenize(tokenizer, [wording(prompt, rng) for prompt in prompts]).to(device))


def evaluate(
    model: Denoiser, vae: AutoencoderKL, evaluated: EvalPrompts, null: Tensor, guidance: float, steps: int
) -> dict[str, float]:
    """Scores by task, and overall, of guided samples of some steps, from the seeds 0 to N - 1."""
    return score(evaluated.prompts, generate(model, vae, evaluated.ids, null, guidance, steps))


@torch.no_grad()
def generate(
    model: Denoiser, vae: AutoencoderKL, ids: Tensor, null: Tensor, guidance: float, steps: int
) -> NDArray[np.uint8]:
    """Images (N, 64, 64, 3) for token ids (N, TOKENS), from the seeds 0 to N - 1; `null` (TOKENS,) is no caption."""
    images = []
    for start in range(0, len(ids), AT_ONCE):
        part = ids[start : start + AT_ONCE]
        z = noise(range(start, start + len(part)), (CHANNELS, SIZE // 4, SIZE // 4)).to(ids.device)
        with autocast(ids.device):
            velocity = guided(model.velocity, model.encode(null[None]), guidance)
            latents = sample(velocity, z, model.encode(part), steps)
        images.append(to_images(decode_in_parts(vae, latents)))
    return np.concatenate(images)
