"""Models as functions from prompts and seeds to images: a teacher in any number of steps, a student in one or few."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import torch

from distill.evaluate.base import Generate, Images
from distill.evaluate.known_prompts import KnownPrompts
from distill.flow import noise
from distill.methods.policies import TeacherGuidance, guided_at
from distill.models.sd3 import (
    decode_in_parts,
    encode_in_parts,
    euler_times,
    load_transformer,
    load_vae,
    sample,
    velocity,
)
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.models.vae import to_images
from distill.options import DecoderChoice
from distill.pipeline import OneStepPipeline, RuntimeOptions


@dataclass(frozen=True)
class Sampling:
    """How a teacher is sampled: number of Euler steps, and guidance."""

    steps: int
    guidance: TeacherGuidance

    @property
    def scale(self) -> float:
        """The guidance scale; of a range, its middle."""
        scale = self.guidance.scale
        return sum(scale) / 2 if isinstance(scale, tuple) else scale

    def nfe(self, shift: float) -> int:
        """Network evaluations per image at a time shift; a guided step takes two, with skip-layer guidance three."""
        times = euler_times(self.steps, shift)[:-1].tolist()
        return self.steps * (1 if self.scale == 1 else 2) + sum(map(self.guidance.skips_at, times))

    @property
    def name(self) -> str:
        """The name in tables."""
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        if self.scale == 1:
            return f"{steps}, unguided"
        layers = ", ".join(map(str, self.guidance.skip_layers))
        return f"{steps}, guidance {self.scale:g}" + (f", skip layers {layers}" if layers else "")

    def as_dict(self) -> dict[str, object]:
        """Plain values: steps, guidance scale, and what else differs from the defaults of `TeacherGuidance`."""
        others = self.guidance.model_dump(
            mode="json", include=TeacherGuidance.model_fields.keys() - {"scale"}, exclude_defaults=True
        )
        return {"steps": self.steps, "guidance": self.scale, **others}


@dataclass(frozen=True)
class StudentModel:
    """A student folder, and the decoder that it is evaluated with: one of `RuntimeOptions.decoder`."""

    folder: Path
    decoder: DecoderChoice = "auto"

    def load(self, device: torch.device) -> OneStepPipeline:
        """Load the student onto a device. Raises what `OneStepPipeline.load` raises."""
        return OneStepPipeline.load(self.folder, device, RuntimeOptions(decoder=self.decoder))


def student_sampler(pipeline: OneStepPipeline, steps: int = 1, size: tuple[int, int] | None = None) -> Generate:
    """Sample a student in one step, or an any-step student in several; `size` None is its native (width, height)."""
    width, height = size or (None, None)
    return lambda prompts, seeds: np.asarray(pipeline(prompts, seeds, width, height, steps))


class TeacherSampler:
    """A teacher on a device. On GPUs text encoders and transformer are in bf16; the autoencoder is always in fp32."""

    def __init__(
        self, folder: SD3Folder, device: torch.device, prompts: Iterable[str] | None = None, scratch: Path | None = None
    ) -> None:
        """Load a teacher. With `prompts`, only these can be generated: the text encoders are freed first.

        The encoded prompts are then on the disk of the folder `scratch`; None is the system's folder for such files.
        """
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.folder = folder
        text = SD3TextEncoder.load(folder, device, dtype)
        self._text = text if prompts is None else KnownPrompts(text, ["", *prompts], scratch or Path(gettempdir()))
        del text
        self._vae = load_vae(folder, device=device)
        self._transformer = load_transformer(folder, dtype, device)

    @torch.no_grad()
    def generate(
        self,
        sampling: Sampling,
        prompts: Sequence[str],
        seeds: Sequence[int],
        shape: tuple[int, int, int] | None = None,
    ) -> Images:
        """Generate images (N, H, W, 3) of latents (C, h, w); None is the teacher's native size.

        Raises ConfigError for a block that the teacher lacks.
        """
        return to_images(decode_in_parts(self._vae, self.latents(sampling, prompts, seeds, shape)))

    @torch.no_grad()
    def latents(
        self,
        sampling: Sampling,
        prompts: Sequence[str],
        seeds: Sequence[int],
        shape: tuple[int, int, int] | None = None,
    ) -> torch.Tensor:
        """Generate latents (N, C, h, w) on the device, as `generate` does for its images."""
        sampling.guidance.check_layers(self.folder.layers)
        z = noise(seeds, shape or self.folder.latent_shape).to(self._transformer.device)
        null, cond = (self._text.encode(texts).to(z.device) for texts in ([""], prompts))
        u = guided_at(sampling.guidance, partial(velocity, self._transformer), null, sampling.scale)
        return sample(u, z, cond, sampling.steps, self.folder.shift)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """For each prompt, whether it is cut to the token limit."""
        return self._text.truncated(prompts)

    def encode(self, images: Images) -> torch.Tensor:
        """Encode images to latents (N, C, h, w)."""
        return encode_in_parts(self._vae, images)
