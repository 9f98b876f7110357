"""Stable Diffusion 3: loading transformer and autoencoder, velocity and sampling.

A velocity is a function of `x_t` (B, C, h, w), `t` (B,) in [0, 1] with 1 = noise, and a condition. Latents are the
scaled ones that the transformer sees.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel
from numpy.typing import NDArray
from torch import Tensor

from distill.flow import shift_time
from distill.models.sd3_files import find_weights
from distill.models.sd3_folder import SD3Folder
from distill.models.text import TextCondition
from distill.models.vae import to_pixels
from distill.models.weights import check_finite, check_shapes

VelocityAt = Callable[[Tensor, float, TextCondition], Tensor]  # of a batch at one time

PIXELS_AT_ONCE = 1 << 21  # per call; an autoencoder's activations are some hundred times an image's pixels
_LAST_TIME = 1e-3  # of diffusers' schedule before its shifts: 1 of 1000 training timesteps


def load_transformer(
    folder: SD3Folder, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SD3Transformer2DModel:
    """Load the transformer of a folder, frozen. Raises TeacherError for non-finite or mismatched weights."""
    return _load(SD3Transformer2DModel, folder.path / "transformer", dtype, device)


def load_vae(
    folder: SD3Folder, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoencoderKL:
    """Load the autoencoder of a folder, frozen. Raises TeacherError for non-finite or mismatched weights."""
    return _load(AutoencoderKL, folder.path / "vae", dtype, device)


def _load(kind: Any, path: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    check_shapes(kind, path)
    own = {"use_safetensors": True, "local_files_only": True, "variant": find_weights(path).variant}
    model = kind.from_pretrained(path, torch_dtype=dtype, **own)
    check_finite(model, path)
    return model.to(device).eval().requires_grad_(False)


def check_parts(folder: SD3Folder) -> None:
    """Raise TeacherError unless the weights of transformer and autoencoder match their configurations."""
    check_shapes(SD3Transformer2DModel, folder.path / "transformer")
    check_shapes(AutoencoderKL, folder.path / "vae")


def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] to latents (B, C, h, w): the posterior's mean, scaled."""
    mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    latents: Tensor = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


def decode_latents(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, H, W), nominally in [-1, 1]."""
    unscaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    pixels: Tensor = vae.decode(unscaled, return_dict=False)[0]
    return pixels


@torch.no_grad()
def encode_in_parts(vae: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """Encode images (N, H, W, 3) in parts of at most PIXELS_AT_ONCE pixels, or one image, to bound the memory."""
    pixels = to_pixels(images)
    at_once = max(1, PIXELS_AT_ONCE // (pixels.shape[-2] * pixels.shape[-1]))
    return torch.cat([encode_images(vae, part) for part in torch.split(pixels, at_once)])


def decode_in_parts(vae: AutoencoderKL, latents: Tensor, at_once: int = PIXELS_AT_ONCE) -> Tensor:
    """Decode in parts of at most `at_once` pixels, or one image, to bound the memory."""
    side = 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = latents.shape[-2] * latents.shape[-1] * side**2
    return torch.cat([decode_latents(vae, part) for part in torch.split(latents, max(1, at_once // pixels))])


def velocity(
    transformer: SD3Transformer2DModel, x_t: Tensor, t: Tensor, cond: TextCondition, skip_layers: Sequence[int] = ()
) -> Tensor:
    """The transformer's velocity (B, C, h, w) in fp32, computed in its own dtype; t stays fp32.

    The blocks whose indices are in `skip_layers` are left out.
    """
    dtype = transformer.dtype
    out: Tensor = transformer(
        hidden_states=x_t.to(dtype),
        encoder_hidden_states=cond.embeds.to(dtype),
        pooled_projections=cond.pooled.to(dtype),
        timestep=1000 * t.float(),
        return_dict=False,
        skip_layers=list(skip_layers) or None,
    )[0]
    return out.float()


def euler_times(steps: int, shift: float) -> Tensor:
    """Times (steps + 1,) of `FlowMatchEulerDiscreteScheduler` with a static shift, from 1 down to 0.

    The scheduler shifts twice: the end points of its even spacing, and then every point.
    """
    last = shift_time(torch.tensor(_LAST_TIME, dtype=torch.float64), shift)
    times = shift_time(torch.linspace(1, float(last), steps, dtype=torch.float64), shift)
    return torch.cat([times, times.new_zeros(1)]).float()


@torch.no_grad()
def sample(u: VelocityAt, noise: Tensor, cond: TextCondition, steps: int, shift: float = 1.0) -> Tensor:
    """Euler's method from noise (B, C, h, w) at t = 1 to latents at t = 0, with the stock pipeline's steps."""
    x = noise.float()
    for t, t_next in pairwise(euler_times(steps, shift).tolist()):
        x = x + (t_next - t) * u(x, t, cond)
    return x
