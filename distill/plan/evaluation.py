"""Arithmetic of evaluations, from configuration files alone."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.evaluate.sampler import Sampling
from distill.models.geometry import Geometry
from distill.models.sd3 import decode_latents, encode_images
from distill.plan.flop import velocity_flop
from distill.plan.meter import Meter, without_data
from distill.plan.step_cost import SHIFT

AUTOENCODER_SPEED = 0.5  # relative to bf16: the autoencoder is in fp32, which GPUs multiply as TF32


@dataclass(frozen=True)
class EvaluationCost:
    """FLOP of the teacher's images, which are made once, and of one evaluation of a student.

    The autoencoder's are divided by AUTOENCODER_SPEED, so that seconds follow from the speed of training. Those of a
    CLIP model are not counted: at 512 pixels, an image takes 0.2 TFLOP of ViT-L/14 and 10 of SD3 and its autoencoder.
    """

    references: float
    evaluation: float


def evaluation_cost(
    geometry: Geometry, size: tuple[int, int], sampling: Sampling, count: int, encodes: bool = True
) -> EvaluationCost:
    """Compute the cost of `count` images of a (width, height) in pixels, of the teacher and of a student.

    `encodes` says whether images are encoded again, for features. The autoencoder runs once on tensors without data.
    """
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(geometry.vae).eval().requires_grad_(False)
    width, height = (side // geometry.pixels_per_latent for side in size)
    with FakeTensorMode(), torch.no_grad():
        without_data(vae)
        with Meter() as autoencoder:
            images = decode_latents(vae, torch.empty(1, geometry.vae["latent_channels"], height, width))
            if encodes:
                encode_images(vae, images)
    network, coded = velocity_flop(geometry, size), autoencoder.flop / AUTOENCODER_SPEED
    return EvaluationCost(count * (sampling.nfe(SHIFT) * network + coded), count * (network + coded))
