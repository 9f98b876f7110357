"""`OneStepPipeline`: a student folder, prompts and seeds in, images out. The one class that serving builds on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor

from distill.errors import SizeError, TeacherError
from distill.flow import noise, one_step
from distill.spec import RECORD, read_json, read_spec
from distill.teacher import decode_latents, load_transformer, load_vae, velocity
from distill.text import SD3TextEncoder, TextCondition

SHIPPED_STUDENT = Path(__file__).parent / "scenes" / "weights" / "student"


@dataclass(frozen=True)
class OneStepSpec:
    """What `onestep.json` says of a student. Sizes are (width, height) in pixels."""

    name: str
    digest: str
    sizes: tuple[tuple[int, int], ...]
    latent_channels: int
    vae_scale_factor: int
    patch_size: int
    token_limit: int  # CLIP tokens of a prompt, start and end included
    max_sequence_length: int
    teacher: str
    method: str
    images_seen: int
    created: int  # Unix seconds of the record


def read_student(folder: Path | str) -> OneStepSpec:
    """Check a student folder and read its record; raises TeacherError when it is missing, cut off, or no student."""
    spec = read_spec(folder)
    record = read_json(spec.folder / RECORD)
    if "start_time" not in record:
        raise TeacherError(
            f"{spec.folder} is a teacher, not a one-step student; distil it with `distill run` first"
        )
    if record["start_time"] != 1.0 or record.get("format") != 1:
        raise TeacherError(
            f"{spec.folder}/{RECORD} is of another format; export the student again with this version"
        )
    side = int(record["image_size"])
    return OneStepSpec(
        name=str(record["name"]),
        digest=spec.digest,
        sizes=((side, side),),
        latent_channels=spec.latent_channels,
        vae_scale_factor=spec.vae_scale_factor,
        patch_size=spec.patch_size,
        token_limit=spec.clip_length,
        max_sequence_length=int(record["max_sequence_length"]),
        teacher=str(record["teacher"]),
        method=str(record.get("method", "unknown")),
        images_seen=int(record.get("images_seen", 0)),
        created=int((spec.folder / RECORD).stat().st_mtime),
    )


class OneStepPipeline:
    """A student on a device. Every stage is a method of its own, so that a server can overlap them."""

    def __init__(
        self, spec: OneStepSpec, text: SD3TextEncoder, transformer: SD3Transformer2DModel, vae: AutoencoderKL
    ) -> None:
        self.spec = spec
        self._text = text
        self._transformer = transformer
        self._vae = vae

    @classmethod
    def load(
        cls, folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Self:
        """Load a student folder; dtype None is bf16 on GPUs, fp32 elsewhere.

        Raises TeacherError for a folder that is not a whole student.
        """
        spec = read_student(folder)
        device = torch.device(device)
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        text = SD3TextEncoder.load(folder, device, dtype, spec.max_sequence_length)
        return cls(spec, text, load_transformer(folder, dtype, device), load_vae(folder, dtype, device))

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """For each prompt, whether the model sees only its beginning."""
        return self._text.truncated(prompts)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """CLIP tokens of each prompt as the model sees it, start and end included."""
        return self._text.count_tokens(prompts)

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Conditions of prompts, one row each."""
        return self._text.encode(prompts)

    @torch.no_grad()
    def latents(
        self, cond: TextCondition, seeds: Sequence[int], width: int | None = None, height: int | None = None
    ) -> Tensor:
        """One call of the network: latents (B, C, h, w). Raises SizeError for a size not made for."""
        width, height = self.size(width, height)
        factor = self.spec.vae_scale_factor
        z = noise(seeds, (self.spec.latent_channels, height // factor, width // factor))
        return one_step(partial(velocity, self._transformer), z.to(self._transformer.device), cond)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, uint8 (B, H, W, 3) on the CPU; rounded on the device, a quarter of the bytes to move."""
        pixels = decode_latents(self._vae, latents).float()
        return pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """The size meant, the native one for None. Raises SizeError for one that the student was not trained for."""
        native = self.spec.sizes[0]
        asked = (width or native[0], height or native[1])
        if asked not in self.spec.sizes:
            known = ", ".join(f"{w}x{h}" for w, h in self.spec.sizes)
            raise SizeError(f"{self.spec.name} makes images of {known}, not {asked[0]}x{asked[1]}")
        return asked

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        width: int | None = None,
        height: int | None = None,
    ) -> Tensor:
        """Images, uint8 (B, H, W, 3), of prompts and seeds."""
        return self.decode(self.latents(self.encode(prompts), seeds, width, height))
