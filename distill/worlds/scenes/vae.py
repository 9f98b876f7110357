"""The autoencoder of the toy dataset: 64x64 RGB images to 16x16 latents of 4 channels and back.

It bounds the quality of the teacher, so it is trained first, on scenes of many objects. Its metric is the score of
images after encoding and decoding.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distill.config_group import ConfigGroup
from distill.models.device import autocast
from distill.models.vae import to_images, to_pixels
from distill.philox import key_of
from distill.training.ema import average_into, new_share
from distill.training.optimizers import set_rate
from distill.training.rate_schedule import RateSchedule
from distill.training.state import TrainingProgress, load_state, save_state
from distill.worlds.scenes.captions import Prompt, Thing, sample_prompt
from distill.worlds.scenes.render import SIZE, place, render
from distill.worlds.scenes.score import score
from distill.worlds.scenes.shapes import SHAPES

LOG_EVERY = 800  # images between two log lines
STATE = "vae-state"  # in the teacher's folder: the training state


class VaeRecipe(ConfigGroup):
    """How the autoencoder is trained; the learning rate decays over the whole budget of `images`."""

    images: int
    seed: int
    batch: int = 16
    learning_rate: float = 2e-3
    warmup: int = 320  # images
    kl_weight: float = 1e-6
    ema_half_life: float = 2_200  # images
    evaluated: int = 1024  # new scenes for the round-trip score and for the scale of the latents
    checkpoint_every: int = 8_000  # images


def make_vae() -> AutoencoderKL:
    """Build an untrained autoencoder: downsampling by 4, 4 channels, no attention, in AutoencoderKL's format."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    # With a wide initial posterior the latents are mostly noise, and the decoder collapses to the background color.
    with torch.no_grad():
        vae.encoder.conv_out.weight[4:] = 0
        vae.encoder.conv_out.bias[4:] = -6
    return vae


def crowded_scenes(count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Render scenes of one to four different objects, mostly four, which teach more than the mix of the prompts."""
    scenes = []
    for n in rng.choice([1, 2, 3, 4], count, p=[0.15, 0.15, 0.2, 0.5]):
        names = rng.choice(len(SHAPES), n)
        scenes.append(place(Prompt("two_object", tuple(Thing(SHAPES[i]) for i in names)), rng))
    return render(scenes)


def train_vae(recipe: VaeRecipe, folder: Path, device: torch.device) -> Iterator[TrainingProgress]:
    """Train to the budget, continuing from the folder's state; save the EMA weights in `folder/vae`."""
    torch.manual_seed(key_of(recipe.seed, "autoencoder weights"))
    vae = make_vae().to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99))
    average = deepcopy(vae)
    modules = {"vae": vae, "ema": average}
    images = load_state(folder / STATE, modules, optimizer, recipe)
    schedule = RateSchedule(recipe.images, recipe.batch, recipe.warmup, decay=recipe.images)

    while images < recipe.images:
        # 1. data: each step has its own seed, so that a resumed run draws the same scenes
        rng = np.random.default_rng((recipe.seed, images))
        torch.manual_seed(key_of(recipe.seed, f"autoencoder {images}"))
        pixels = to_pixels(crowded_scenes(recipe.batch, rng), device)

        # 2. round trip
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample

        # 3. loss: the absolute error keeps edges sharp, the squared error keeps colors exact
        error = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
        loss = error + recipe.kl_weight * posterior.kl().mean()

        # 4. step
        set_rate(optimizer, recipe.learning_rate * schedule.factor(images))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        before, images = images, images + recipe.batch
        average_into(average.parameters(), vae.parameters(), new_share(recipe.ema_half_life, images, recipe.batch))

        # 5. log and save
        save = partial(save_state, folder / STATE, modules, optimizer, images, recipe)
        progress = TrainingProgress(before, images, recipe.images, {}, save)
        finished = images >= recipe.images
        if finished or progress.crosses(LOG_EVERY):
            progress.metrics["psnr_db"] = float(10 * torch.log10(4 / F.mse_loss(decoded.detach(), pixels)))
        if finished or progress.crosses(recipe.checkpoint_every):
            progress.metrics["round_trip"] = round_trip(average, recipe.evaluated, seed=0, device=device)
            save()
        yield progress

    set_latent_scale(average, recipe.evaluated, recipe.seed, device)
    # In the precision of the teacher's folder, so that scenes are encoded by the published weights.
    deepcopy(average).half().save_pretrained(folder / "vae")


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL, count: int, seed: int, device: torch.device) -> None:
    """Set `shift_factor` and `scaling_factor` so that latents have mean 0 and standard deviation 1, as in SD3."""
    rng = np.random.default_rng((seed, 10**9))
    scenes = [place(sample_prompt(rng), rng) for _ in range(count)]
    latents = encode_mean(vae, render(scenes), device)
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))


@torch.no_grad()
def encode_mean(vae: AutoencoderKL, images: NDArray[np.uint8], device: torch.device, batch: int = 128) -> Tensor:
    """Encode images to posterior means (N, 4, 16, 16), unscaled, in fp32 on the device."""
    means = []
    with autocast(device):
        for start in range(0, len(images), batch):
            posterior = vae.encode(to_pixels(images[start : start + batch], device)).latent_dist
            means.append(posterior.mean.float())
    return torch.cat(means)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, count: int, seed: int, device: torch.device) -> float:
    """Score `count` new training scenes after encoding and decoding, in [0, 1]: an upper bound for the teacher."""
    rng = np.random.default_rng((seed, count))
    prompts = [sample_prompt(rng) for _ in range(count)]
    latents = encode_mean(vae, render([place(prompt, rng) for prompt in prompts]), device)
    decoded = torch.cat([vae.decode(part).sample.cpu() for part in torch.split(latents, 128)])
    return score(prompts, to_images(decoded))["overall"]
