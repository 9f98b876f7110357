"""A small teacher: transformer and text encoders as one module, its training, and its folder.

Flow matching with the components of Stable Diffusion 3: x_t = (1 - t) x_0 + t eps, loss |v(x_t, t, c) - (eps - x_0)|^2,
logit-normal t, caption dropout for classifier-free guidance, and an exponential moving average (EMA) of all weights.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from distill.errors import TeacherError
from distill.files import make_readable
from distill.flow import interpolate
from distill.models import attention
from distill.models.cuda_graphs import CudaGraphed
from distill.models.device import autocast, fast_bfloat16
from distill.models.sd3 import velocity
from distill.models.text import TextCondition
from distill.models.weights import check_finite
from distill.philox import Draw
from distill.training.ema import average_into, new_share
from distill.training.optimizers import set_rate
from distill.training.rate_schedule import RateSchedule
from distill.training.state import TrainingProgress, load_state, save_state
from distill.worlds.recipe import TrainingRecipe

LOG_EVERY = 12_800  # images between two log lines; metrics are means over them
FINAL_LR = 0.02  # final learning rate, as a share of the peak


@dataclass(frozen=True)
class TrainingData:
    """What a denoiser is trained on, on its device.

    `sample` draws latents x_0 (B, C, h, w) and the token ids (B, L) of their captions; `null` (L,) holds the token ids
    of the empty caption.
    """

    sample: Callable[[Draw], tuple[Tensor, Tensor]]
    null: Tensor


class Denoiser(nn.Module):
    """Transformer and two small CLIP text encoders as one module: token ids in, velocity out.

    Latents are (channels, side, side); the position table has room for patches of 2, whatever `patch` is.
    The transformer's `joint_attention_dim` is twice the encoders' `width`, because their states are concatenated.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        width: int,
        channels: int,
        side: int,
        patch: int,
        layers: int,
        heads: int,
        head_dim: int,
    ) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text_encoder = CLIPTextModelWithProjection(config)
        self.text_encoder_2 = CLIPTextModelWithProjection(deepcopy(config))
        self.transformer = SD3Transformer2DModel(
            sample_size=side,
            patch_size=patch,
            in_channels=channels,
            out_channels=channels,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            caption_projection_dim=heads * head_dim,
            joint_attention_dim=2 * width,
            pooled_projection_dim=2 * width,
            pos_embed_max_size=side // 2,
            qk_norm="rms_norm",
        )

    def encode(self, ids: Tensor) -> TextCondition:
        """Encode token ids (B, L) as SD3 does: concatenated penultimate states, and pooled projections."""
        outputs = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return TextCondition(embeds, torch.cat([output.text_embeds for output in outputs], dim=-1))

    def velocity(self, x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
        """Return the velocity (B, C, h, w) in fp32 at x_t and t in [0, 1]."""
        return velocity(self.transformer, x_t, t, cond)

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Return the velocity for token ids."""
        return self.velocity(x_t, t, self.encode(ids))

    def start_from(self, folder: Path) -> None:
        """Load the weights of a teacher folder. Raises TeacherError if its architecture differs."""
        for name in ("transformer", "text_encoder", "text_encoder_2"):
            module: Any = getattr(self, name)
            model = type(module).from_pretrained(folder / name, use_safetensors=True, local_files_only=True)
            check_finite(model, folder / name)
            weights = model.state_dict()
            if {key: value.shape for key, value in weights.items()} != _shapes(module):
                raise TeacherError(f"{folder / name} has another architecture; start from a teacher of this training")
            module.load_state_dict(weights)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Tokenize to ids (B, L), padded to the tokenizer's length. Each distinct text is tokenized once."""
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    ids: Tensor = tokenizer(list(distinct), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids[[distinct[text] for text in texts]]


def training_step(
    model: Denoiser,
    average: Denoiser,
    share: Tensor,
    optimizer: torch.optim.Optimizer,
    data: TrainingData,
    recipe: TrainingRecipe,
) -> Callable[[Tensor], Tensor]:
    """Build a training step: from image indices (B,) to loss and gradient norm (2,).

    `share` () is the weight of the new weights in the EMA. The step never synchronizes the host with the device, so
    that one CUDA graph serves every step.
    """

    def step(images: Tensor) -> Tensor:
        # 1. data
        draw = Draw(recipe.seed, "teacher", images)
        x_0, ids = data.sample(draw)
        dropped = draw.uniform() < recipe.caption_dropout
        ids = torch.where(dropped[:, None], data.null, ids)
        t = torch.sigmoid(recipe.time_mean + recipe.time_std * draw.normal(()))
        eps = draw.normal(x_0.shape[1:])

        # 2. flow matching
        with autocast(images.device):
            v = model(interpolate(x_0, eps, t), t, ids)
        loss = F.mse_loss(v, eps - x_0)

        # 3. optimizer step and EMA
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
    data: TrainingData,
    recipe: TrainingRecipe,
    state: Path,
    stage: range,
    compiled: bool,
) -> Iterator[TrainingProgress]:
    """Train on the images of a stage of the recipe, by their indices, continuing from the newest state.

    `average` is a copy of the model and receives the EMA. A step depends only on weights, optimizer state and image
    indices, so that a resumed training is bit-identical to an uninterrupted one. On a GPU a step is one CUDA graph.
    """
    device = data.null.device
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
    images = max(stage.start, load_state(state, modules, optimizer, recipe))
    kernel = attention.resolve("auto", torch.bfloat16 if fast_bfloat16(device) else torch.float32, device)
    attention.use(kernel, model.transformer)
    if kernel == "math":  # transformers' name for the same kernel
        for encoder in (model.text_encoder, model.text_encoder_2):
            encoder.set_attn_implementation("eager")
    if compiled:
        for block in model.transformer.transformer_blocks:
            block.compile(fullgraph=True)
    schedule = RateSchedule(len(stage), recipe.batch, recipe.warmup, recipe.decay, "linear", FINAL_LR)
    share = torch.zeros((), device=device)
    step = training_step(model, average, share, optimizer, data, recipe)
    run_step = CudaGraphed(step, effects=True) if cuda else step

    sums, steps = torch.zeros(2, device=device), 0
    while images < stage.stop:
        set_rate(optimizer, recipe.learning_rate * schedule.factor(images - stage.start))
        share.fill_(new_share(recipe.ema_half_life, images - stage.start + recipe.batch, recipe.batch))
        sums += run_step(torch.arange(images, images + recipe.batch, device=device))
        before, images, steps = images, images + recipe.batch, steps + 1

        save = partial(save_state, state, modules, optimizer, images, recipe)
        progress = TrainingProgress(before, images, recipe.images, {}, save)
        finished = images >= stage.stop
        if finished or progress.crosses(LOG_EVERY):
            loss, norm = (sums / steps).tolist()
            progress.metrics.update(loss=loss, gradient=norm)
            sums, steps = torch.zeros_like(sums), 0
        if finished or progress.crosses(recipe.checkpoint_every):
            save()
        yield progress


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def save_pipeline(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the pipeline folder in fp16 safetensors, as stock diffusers loads it."""
    vae = deepcopy(vae)
    vae.register_to_config(_name_or_path="")  # else the file names the folder of this machine
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
    for path in folder.rglob("*.safetensors"):
        make_readable(path)
