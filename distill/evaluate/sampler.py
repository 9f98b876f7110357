"""Models as functions from prompts and seeds to images: a teacher at any steps and guidance, a student in its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from distill.evaluate.base import Generate, Images
from distill.flow import noise
from distill.models.sd3 import (
    decode_in_parts,
    encode_images,
    guided,
    load_transformer,
    load_vae,
    sample,
    velocity,
)
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.models.vae import to_images, to_pixels
from distill.pipeline import OneStepPipeline


@dataclass(frozen=True)
class Setting:
    """How a teacher is sampled: Euler steps, and the scale of guidance, 1 for none."""

    steps: int
    guidance: float

    @property
    def nfe(self) -> int:
        """Evaluations of the network per image; guidance takes two a step."""
        return self.steps * (1 if self.guidance == 1 else 2)

    @property
    def name(self) -> str:
        """As tables have it."""
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        return f"{steps}, unguided" if self.guidance == 1 else f"{steps}, guidance {self.guidance:g}"


def student_sampler(pipeline: OneStepPipeline, steps: int = 1) -> Generate:
    """A student's one step, or several of a student of any step."""
    return lambda prompts, seeds: np.asarray(pipeline(prompts, seeds, steps=steps))


class TeacherSampler:
    """A teacher on a device. Text encoders and transformer are in bf16 on GPUs, the autoencoder always in fp32."""

    def __init__(self, folder: SD3Folder, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.folder = folder
        self._text = SD3TextEncoder.load(folder, device, dtype)
        self._vae = load_vae(folder, device=device)
        self._transformer = load_transformer(folder, dtype, device)

    @torch.no_grad()
    def generate(self, setting: Setting, prompts: Sequence[str], seeds: Sequence[int]) -> Images:
        """Images (N, H, W, 3) at the teacher's native size."""
        z = noise(seeds, self.folder.latent_shape).to(self._transformer.device)
        u = guided(partial(velocity, self._transformer), self._text.encode([""]), setting.guidance)
        latents = sample(u, z, self._text.encode(prompts), setting.steps, self.folder.shift)
        return to_images(decode_in_parts(self._vae, latents))

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """For each prompt, whether the model sees only its beginning."""
        return self._text.truncated(prompts)

    @torch.no_grad()
    def encode(self, images: Images) -> torch.Tensor:
        """Latents (N, C, h, w) of images."""
        return encode_images(self._vae, to_pixels(images))
