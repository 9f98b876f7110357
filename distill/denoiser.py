"""A teacher that is trained here: transformer and text encoders as one module, its loop, and its folder.

Flow matching in Stable Diffusion 3's own parts: x_t = (1 - t) x_0 + t eps, |v(x_t, t, c) - (eps - x_0)|^2, logit-normal
t, some captions dropped so that guidance has its null prompt, and an exponential moving average of all weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
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
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from distill.device import fast_bfloat16
from distill.flow import interpolate, logit_normal
from distill.scenes.state import load_state, save_state
from distill.scenes.vae import Progress, ema
from distill.text import TextCondition

Sample = Callable[[np.random.Generator], tuple[Tensor, list[str]]]  # latents x_0 (B, C, h, w) and their captions


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained."""

    images: int
    batch: int
    learning_rate: float
    weight_decay: float
    caption_dropout: float
    time_mean: float
    time_std: float
    ema: float
    seed: int


class Denoiser(nn.Module):
    """Transformer and two small CLIP text encoders as one module: prompts' token ids in, velocity out.

    The encoders' width sets the transformer's: joint attention sees both side by side.
    """

    def __init__(self, tokenizer: CLIPTokenizer, width: int, layers: int, transformer: Mapping[str, Any]) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text_encoder = CLIPTextModelWithProjection(config)
        self.text_encoder_2 = CLIPTextModelWithProjection(deepcopy(config))
        self.transformer = SD3Transformer2DModel(
            joint_attention_dim=2 * width, pooled_projection_dim=2 * width, qk_norm="rms_norm", **transformer
        )

    def encode(self, ids: Tensor) -> TextCondition:
        """Token ids (B, L) to what SD3 makes of them: penultimate states side by side, pooled projections."""
        outputs = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return TextCondition(embeds, torch.cat([output.text_embeds for output in outputs], dim=-1))

    def velocity(self, x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
        """Velocity (B, C, h, w) at x_t and t in [0, 1]."""
        out: Tensor = self.transformer(x_t, cond.embeds, cond.pooled, 1000 * t, return_dict=False)[0]
        return out

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Velocity for token ids; the form that is trained and compiled."""
        return self.velocity(x_t, t, self.encode(ids))


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (B, L), of the tokenizer's own length."""
    ids: Tensor = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 where the device computes it faster than fp32, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16) if fast_bfloat16(device) else nullcontext()


def fit(
    model: Denoiser,
    average: Any,
    tokenizer: CLIPTokenizer,
    sample: Sample,
    recipe: Recipe,
    state: Path,
    device: torch.device,
    compiled: bool,
    first: int = 0,
    last: int | None = None,
) -> Iterator[Progress]:
    """Train from `first` images seen to `last`, which is the recipe's end, continuing from the newest state.

    `average` is an `AveragedModel` of the model. `sample` draws a batch from the step's own numbers, so that a
    training that was stopped ends with the same bits.
    """
    last = recipe.images if last is None else last
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    modules: dict[str, nn.Module] = {"model": model, "ema": average}
    images = max(first, load_state(state, modules, optimizer, recipe))
    forward = torch.compile(model) if compiled else model

    while images < last:
        # 1. data: every step from its own seed, so that a resumed run draws the same
        step = images // recipe.batch
        rng = np.random.default_rng((recipe.seed, 1, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        x_0, texts = sample(rng)
        ids = tokenize(tokenizer, texts).to(device)
        x_0 = x_0.to(device)
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
        yield Progress(images, recipe.images, figures, save)


def averaged(model: Denoiser, decay: float) -> Any:
    """The exponential moving average of a model, whose `module` is the model that is kept."""
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema(decay))


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
