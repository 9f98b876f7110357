"""Arithmetic of evaluations by the teacher's images, from configuration files alone."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.config import EvaluationSettings
from distill.evaluate.references import image_count
from distill.evaluate.sampler import Sampling
from distill.methods.policies import TeacherGuidance
from distill.models.geometry import Geometry
from distill.models.sd3 import decode_latents, encode_images
from distill.plan.estimate import SHIFT
from distill.plan.flop import velocity_flop
from distill.plan.meter import Meter, without_data

AUTOENCODER_SPEED = 0.5  # relative to bf16: the autoencoder is in fp32, which GPUs multiply as TF32


@dataclass(frozen=True)
class EvaluationCost:
    """FLOP of the teacher's images, which are made once, and of one evaluation of a student.

    The autoencoder's are divided by AUTOENCODER_SPEED, so that seconds follow from the speed of training.
    """

    references: float
    evaluation: float


def evaluation_cost(
    geometry: Geometry, size: tuple[int, int], guidance: TeacherGuidance, settings: EvaluationSettings
) -> EvaluationCost:
    """Compute the cost for images of a (width, height) in pixels; the autoencoder runs once on tensors without data."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(geometry.vae).eval().requires_grad_(False)
    width, height = (side // geometry.pixels_per_latent for side in size)
    with FakeTensorMode(), torch.no_grad():
        without_data(vae)
        with Meter() as autoencoder:
            encode_images(vae, decode_latents(vae, torch.empty(1, geometry.vae["latent_channels"], height, width)))
    count, network = image_count(settings.images), velocity_flop(geometry, size)
    coded = autoencoder.flop / AUTOENCODER_SPEED
    nfe = Sampling(settings.teacher_steps, guidance).nfe(SHIFT)
    return EvaluationCost(count * (nfe * network + coded), count * (network + coded))
