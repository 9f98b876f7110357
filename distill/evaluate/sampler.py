"""Models as functions from prompts and seeds to images: a teacher in any number of steps, a student in one or few."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from distill.evaluate.base import Generate, Images
from distill.flow import noise
from distill.models.sd3 import decode_in_parts, encode_images, guided, load_transformer, load_vae, sample, velocity
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.models.vae import to_images, to_pixels
from distill.pipeline import OneStepPipeline


@dataclass(frozen=True)
class Sampling:
    """How a teacher is sampled: number of Euler steps, and guidance scale (1 is unguided)."""

    steps: int
    guidance: float

    @property
    def nfe(self) -> int:
        """Network evaluations per image; a guided step takes two."""
        return self.steps * (1 if self.guidance == 1 else 2)

    @property
    def name(self) -> str:
        """The name in tables."""
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        return f"{steps}, unguided" if self.guidance == 1 else f"{steps}, guidance {self.guidance:g}"


def student_sampler(pipeline: OneStepPipeline, steps: int = 1) -> Generate:
    """Sample a student in one step, or an any-step student in several."""
    return lambda prompts, seeds: np.asarray(pipeline(prompts, seeds, steps=steps))


class TeacherSampler:
    """A teacher on a device. On GPUs text encoders and transformer are in bf16; the autoencoder is always in fp32."""

    def __init__(self, folder: SD3Folder, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.folder = folder
        self._text = SD3TextEncoder.load(folder, device, dtype)
        self._vae = load_vae(folder, device=device)
        self._transformer = load_transformer(folder, dtype, device)

    @torch.no_grad()
    def generate(self, sampling: Sampling, prompts: Sequence[str], seeds: Sequence[int]) -> Images:
        """Generate images (N, H, W, 3) at the teacher's native size."""
        z = noise(seeds, self.folder.latent_shape).to(self._transformer.device)
        u = guided(partial(velocity, self._transformer), self._text.encode([""]), sampling.guidance)
        latents = sample(u, z, self._text.encode(prompts), sampling.steps, self.folder.shift)
        return to_images(decode_in_parts(self._vae, latents))

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """For each prompt, whether it is cut to the token limit."""
        return self._text.truncated(prompts)

    @torch.no_grad()
    def encode(self, images: Images) -> torch.Tensor:
        """Encode images to latents (N, C, h, w)."""
        return encode_images(self._vae, to_pixels(images))
