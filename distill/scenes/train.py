"""`distill teacher`: the world's teacher in Stable Diffusion 3's own format, trained from nothing.

First the autoencoder (`vae.py`), then the transformer together with two small CLIP text encoders, by flow matching
on latents that are encoded once: x_t = (1 - t) x_0 + t eps, |v(x_t, t, c) - (eps - x_0)|^2, logit-normal t, one
caption in ten dropped so that guidance has its null prompt, and an exponential moving average of all weights.

The transformer learns coarse to fine: on large patches, where an image is 16 tokens and cheap, it learns which words
mean which colours and places; then the same blocks go on with small patches, 64 tokens, and learn exact shapes.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from distill.device import fast_bfloat16
from distill.flow import interpolate, logit_normal, noise
from distill.scenes.captions import Prompt, evaluation_prompts, sample_prompt, vocabulary, wording
from distill.scenes.render import place, render
from distill.scenes.score import score
from distill.scenes.state import load_state, save_state
from distill.scenes.vae import Progress, ema, encode_mean, to_images
from distill.teacher import decode_latents, guided, sample
from distill.text import TextCondition
from distill.tokenizer import build_clip_tokenizer

TOKENS = 16  # CLIP tokens of a prompt, start and end included
T5_TOKENS = 0  # tokens of the absent T5: none, so that text does not outweigh the 64 image tokens
COARSE, FINE = 4, 2  # sides of a patch, in latent pixels
CHANNELS = 4  # of the latents


@dataclass(frozen=True)
class TeacherRecipe:
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


class Denoiser(nn.Module):
    """Transformer and text encoders as one module: prompts' token ids in, velocity out."""

    def __init__(self, vocabulary_size: int, end: int, patch: int) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=96,
            intermediate_size=384,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=TOKENS,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
        self.text_encoder = CLIPTextModelWithProjection(config)
        self.text_encoder_2 = CLIPTextModelWithProjection(deepcopy(config))
        self.transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=patch,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            num_attention_heads=11,
            attention_head_dim=16,
            joint_attention_dim=192,
            caption_projection_dim=176,
            pooled_projection_dim=192,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )

    def encode(self, ids: Tensor) -> TextCondition:
        """Token ids (B, TOKENS) to what SD3 makes of them: penultimate states side by side, pooled projections."""
        outputs = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return TextCondition(embeds, torch.cat([output.text_embeds for output in outputs], dim=-1))

    def velocity(self, x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
        """Velocity (B, 4, 16, 16) at x_t and t in [0, 1]."""
        out: Tensor = self.transformer(x_t, cond.embeds, cond.pooled, 1000 * t, return_dict=False)[0]
        return out

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Velocity for token ids; the form that is trained and compiled."""
        return self.velocity(x_t, t, self.encode(ids))


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (B, TOKENS)."""
    batch = tokenizer(list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 where the device computes it faster than fp32, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16) if fast_bfloat16(device) else nullcontext()


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
        aside = path.with_suffix(".partial")
        save_file({"latents": latents.contiguous()}, aside)
        aside.rename(path)
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
    recipe: TeacherRecipe, folder: Path, device: torch.device, compiled: bool = True
) -> Iterator[Progress]:
    """Train until the budget is seen, continuing from the folder's states; needs `folder/vae`.

    At the end `folder` holds the whole pipeline in `StableDiffusion3Pipeline`'s own layout, with EMA weights.
    """
    torch.manual_seed(recipe.seed)
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device).eval()
    tokenizer = build_clip_tokenizer(vocabulary(), TOKENS)
    prompts, latents = scene_latents(vae, recipe, folder, device)
    averaged: Any = None
    for patch, first, last in ((COARSE, 0, recipe.coarse_images), (FINE, recipe.coarse_images, recipe.images)):
        model = Denoiser(len(tokenizer), tokenizer.eos_token_id, patch)
        if averaged is not None:
            refine(averaged, model)
        model.to(device)
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema(recipe.ema))
        averaged = average.module
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        modules: dict[str, nn.Module] = {"model": model, "ema": average}
        state = folder / f"patch-{patch}-state"
        images = max(first, load_state(state, modules, optimizer, recipe))
        forward = torch.compile(model) if compiled else model

        while images < last:
            # 1. data: every step from its own seed, so that a resumed run draws the same
            step = images // recipe.batch
            rng = np.random.default_rng((recipe.seed, 1, step))
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            rows = rng.integers(len(prompts), size=recipe.batch)
            dropped = rng.random(recipe.batch) < recipe.caption_dropout
            texts = ["" if drop else wording(prompts[i], rng) for i, drop in zip(rows, dropped, strict=True)]
            ids = tokenize(tokenizer, texts).to(device)
            x_0 = latents[torch.from_numpy(rows)].to(device)
            eps = torch.randn(x_0.shape, generator=generator).to(device)
            t = logit_normal(recipe.batch, recipe.time_mean, recipe.time_std, generator=generator).to(device)

            # 2. flow matching
            with autocast(device):
                v = forward(interpolate(x_0, eps, t), t, ids)
            loss = F.mse_loss(v.float(), eps - x_0)

            # 3. step: warm up, hold, and decay over the last four tenths
            done = (images - first) / (last - first)
            rate = min(1.0, ((images - first) / recipe.batch + 1) / 300, (1 - done) / 0.4)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
            images += recipe.batch
            step += 1

            # 4. report and keep
            finished = images >= last
            figures: dict[str, float] = {}
            if finished or step % 100 == 0:
                figures |= {"loss": float(loss.detach()), "gradient": float(norm)}
            save = partial(save_state, state, modules, optimizer, images, recipe)
            if finished or step % 1000 == 0:
                save()
                figures |= quick_score(averaged, vae, tokenizer, device, 2.5, recipe.per_task, True, 16)
            yield Progress(images, recipe.images, figures, save)

    save_pipeline(averaged, vae, tokenizer, folder)
    record = {
        "max_sequence_length": T5_TOKENS,
        "guidance": best_guidance(averaged, vae, tokenizer, recipe.per_task, device),
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
    model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, per_task: int, device: torch.device
) -> float:
    """The guidance scale of the highest score on prompts that training saw; the held-out ones stay untouched."""
    scales = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
    scores = [quick_score(model, vae, tokenizer, device, g, per_task, False, 28)["overall"] for g in scales]
    return scales[int(np.argmax(scores))]


def save_pipeline(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the pipeline folder, fp16 safetensors, as stock diffusers loads it."""
    vae = deepcopy(vae)
    vae.register_to_config(_name_or_path="")  # else the folder it was trained in travels along
    pipeline = StableDiffusion3Pipeline(
        transformer=deepcopy(model.transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=vae,
        text_encoder=deepcopy(model.text_encoder),
        tokenizer=tokenizer,
        text_encoder_2=deepcopy(model.text_encoder_2),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
