"""Arithmetic of the autoencoder, from its configuration alone."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.models.geometry import Geometry
from distill.models.sd3 import decode_latents, encode_images
from distill.plan.meter import Meter, without_data

SPEED = 0.5  # relative to bf16: the autoencoder is in fp32, which GPUs multiply as TF32


@dataclass(frozen=True)
class AutoencoderCost:
    """FLOP of decoding and of encoding an image, divided by SPEED, so that seconds follow from the speed of bf16."""

    decoding: float
    encoding: float


def autoencoder_cost(geometry: Geometry, size: tuple[int, int]) -> AutoencoderCost:
    """Compute the cost of an image of a (width, height) in pixels, by one run on tensors without data."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(geometry.vae).eval().requires_grad_(False)
    width, height = (side // geometry.pixels_per_latent for side in size)
    with FakeTensorMode(), torch.no_grad():
        without_data(vae)
        with Meter() as decoding:
            images = decode_latents(vae, torch.empty(1, geometry.vae["latent_channels"], height, width))
        with Meter() as encoding:
            encode_images(vae, images)
    return AutoencoderCost(decoding.flop / SPEED, encoding.flop / SPEED)
