"""A teacher that is trained here: transformer and text encoders as one module, its training, and its folder.

Flow matching in Stable Diffusion 3's own parts: x_t = (1 - t) x_0 + t eps, |v(x_t, t, c) - (eps - x_0)|^2, logit-normal
t, some captions dropped so that guidance has its null prompt, and an exponential moving average of all weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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

from distill.errors import TeacherError
from distill.flow import interpolate
from distill.models import attention
from distill.models.device import autocast, fast_bfloat16
from distill.models.text import TextCondition
from distill.models.weights import check_finite
from distill.philox import Draw
from distill.student.graphs import Graphed
from distill.training.ema import average_into, new_share
from distill.training.optimizers import set_rate
from distill.training.state import Progress, load_state, save_state

REPORT = 12_800  # images between two metrics, which are means over them
LOWEST_RATE = 0.02  # share of the peak learning rate that the decay ends at

Sample = Callable[[Draw], tuple[Tensor, Tensor]]  # latents x_0 (B, C, h, w) and token ids (B, L) of their captions


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a teacher is trained. Warm-up, decay, half-life and cadences are counted in images."""

    images: int
    batch: int
    learning_rate: float
    warmup: int
    decay: int
    ema_half_life: float
    checkpoint_every: int
    seed: int
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    caption_dropout: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.0


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
        """Velocity (B, C, h, w), in fp32, at x_t and t in [0, 1]."""
        out: Tensor = self.transformer(x_t, cond.embeds, cond.pooled, 1000 * t, return_dict=False)[0]
        return out.float()

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Velocity for token ids."""
        return self.velocity(x_t, t, self.encode(ids))

    def start_from(self, folder: Path) -> None:
        """Take the weights of a teacher folder. Raises TeacherError unless it has this architecture."""
        for name in ("transformer", "text_encoder", "text_encoder_2"):
            mine: Any = getattr(self, name)
            model = type(mine).from_pretrained(folder / name, use_safetensors=True, local_files_only=True)
            check_finite(model, folder / name)
            given = model.state_dict()
            if {key: value.shape for key, value in given.items()} != _shapes(mine):
                raise TeacherError(f"{folder / name} has another architecture than the one that is trained here")
            mine.load_state_dict(given)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (B, L), of the tokenizer's own length; each distinct text is tokenized once."""
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    ids: Tensor = tokenizer(list(distinct), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids[[distinct[text] for text in texts]]


def training_step(
    model: Denoiser,
    average: Denoiser,
    share: Tensor,
    optimizer: torch.optim.Optimizer,
    sample: Sample,
    null: Tensor,
    recipe: Recipe,
) -> Callable[[Tensor], Tensor]:
    """A training step as a function of the indices (B,) of its images, to its loss and its gradient's norm (2,).

    `share` () is that of the new weights in the average, `null` (L,) the token ids of the empty caption. The step reads
    nothing from the device and sends nothing to it, so that a CUDA graph of it holds for every step.
    """

    def step(images: Tensor) -> Tensor:
        # 1. data
        draw = Draw(recipe.seed, "teacher", images)
        x_0, ids = sample(draw)
        dropped = draw.uniform() < recipe.caption_dropout
        ids = torch.where(dropped[:, None], null, ids)
        t = torch.sigmoid(recipe.time_mean + recipe.time_std * draw.normal(()))
        eps = draw.normal(x_0.shape[1:])

        # 2. flow matching
        with autocast(images.device):
            v = model(interpolate(x_0, eps, t), t, ids)
        loss = F.mse_loss(v, eps - x_0)

        # 3. step, and average
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        average_into(average.parameters(), model.parameters(), share)
        return torch.stack([loss.detach(), norm])

    return step


def fit(
    model: Denoiser,
    average: Denoiser,
    sample: Sample,
    null: Tensor,
    recipe: Recipe,
    state: Path,
    device: torch.device,
    compiled: bool,
    first: int = 0,
    last: int | None = None,
) -> Iterator[Progress]:
    """Train from `first` images seen to `last`, which is the recipe's end, continuing from the newest state.

    `average` is a copy of the model. A step is a function of weights, optimizer and image indices, so that a resumed
    training ends with the same bits. On a GPU it is replayed as one CUDA graph.
    """
    last = recipe.images if last is None else last
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=torch.tensor(recipe.learning_rate, device=device) if cuda else recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
        capturable=cuda,
    )
    modules = {"model": model, "ema": average}
    images = max(first, load_state(state, modules, optimizer, recipe))
    kernel = attention.resolve("auto", torch.bfloat16 if fast_bfloat16(device) else torch.float32, device)
    attention.use(kernel, model.transformer)
    if kernel == "math":  # the text encoders' name for the same
        for encoder in (model.text_encoder, model.text_encoder_2):
            encoder.set_attn_implementation("eager")
    if compiled:
        for block in model.transformer.transformer_blocks:
            block.compile(fullgraph=True)
    share = torch.zeros((), device=device)
    step = training_step(model, average, share, optimizer, sample, null, recipe)
    take = Graphed(step, effects=True) if cuda else step

    sums, steps = torch.zeros(2, device=device), 0
    while images < last:
        set_rate(optimizer, recipe.learning_rate * rate(recipe, images - first, last - first))
        share.fill_(new_share(recipe.ema_half_life, images - first + recipe.batch, recipe.batch))
        sums += take(torch.arange(images, images + recipe.batch, device=device))
        before, images, steps = images, images + recipe.batch, steps + 1

        save = partial(save_state, state, modules, optimizer, images, recipe)
        progress = Progress(before, images, recipe.images, {}, save)
        finished = images >= last
        if finished or progress.crosses(REPORT):
            loss, norm = (sums / steps).tolist()
            progress.metrics.update(loss=loss, gradient=norm)
            sums, steps = torch.zeros_like(sums), 0
        if finished or progress.crosses(recipe.checkpoint_every):
            save()
        yield progress


def rate(recipe: Recipe, seen: int, budget: int) -> float:
    """Share of the peak learning rate after `seen` images of a budget: a linear rise, a plateau, a linear fall."""
    rise = min(1.0, (seen + recipe.batch) / max(recipe.warmup, 1))
    left = min(1.0, (budget - seen) / max(min(recipe.decay, budget), 1))
    return rise * (LOWEST_RATE + (1 - LOWEST_RATE) * left)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


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
