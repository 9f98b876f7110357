"""`OneStepPipeline`: a student folder, prompts and seeds in, images out. The one class that serving builds on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel
from torch import Tensor

from distill.errors import ConfigError, DivergedError, SizeError, TeacherError
from distill.flow import jump, noise, one_step
from distill.models import attention, quantize
from distill.models.device import to_device, to_host
from distill.models.sd3_folder import FORMAT, RECORD, read_json, read_spec
from distill.models.teacher import decode_latents, load_transformer, load_vae, velocity
from distill.models.text import SD3TextEncoder, TextCondition
from distill.models.tiny_vae import load_tiny_vae
from distill.models.two_times import load_second_time
from distill.student.adapters import Adapter as Adapter
from distill.student.adapters import Merger, read_adapter
from distill.student.graphs import Graphed
from distill.student.runtime import Runtime as Runtime

SHIPPED_STUDENT = Path(__file__).parent / "worlds" / "scenes" / "weights" / "student"
FILLING_TOKENS = 1024  # an image of so many leaves a device nothing to gain from a second one beside it


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
    any_step: bool = False  # more steps than one make better images
    has_t5: bool = False

    @property
    def image_tokens(self) -> int:
        """Tokens that the transformer sees of a native image."""
        width, height = self.sizes[0]
        return width * height // (self.vae_scale_factor * self.patch_size) ** 2

    def check_steps(self, steps: int) -> None:
        """Raise ConfigError unless the student makes images in so many."""
        if steps < 1 or (steps > 1 and not self.any_step):
            made = "any number of steps from 1" if self.any_step else "one step; set steps to 1"
            raise ConfigError(f"{self.name} makes images in {made}, not {steps}")


def read_student(folder: Path | str) -> OneStepSpec:
    """Check a student folder and read its record; raises TeacherError when it is missing, cut off, or no student."""
    spec = read_spec(folder)
    record = read_json(spec.folder / RECORD) if (spec.folder / RECORD).exists() else {}
    if "start_time" not in record:
        raise TeacherError(f"{spec.folder} is a teacher, not a one-step student; distill it with `distill run` first")
    if record["start_time"] != 1.0 or record.get("format") != FORMAT:
        raise TeacherError(f"{spec.folder}/{RECORD} is of another format; export the student again with this version")
    try:
        native = int(record["image_size"])
        sizes = record.get("sizes", [[native, native]])  # students exported before sizes were a choice have one
        return OneStepSpec(
            name=str(record["name"]),
            digest=spec.digest,
            sizes=tuple((int(width), int(height)) for width, height in sizes),
            latent_channels=spec.latent_channels,
            vae_scale_factor=spec.vae_scale_factor,
            patch_size=spec.patch_size,
            token_limit=spec.clip_length,
            max_sequence_length=int(record["max_sequence_length"]),
            teacher=str(record["teacher"]),
            method=str(record["method"]),
            images_seen=int(record["images_seen"]),
            created=int((spec.folder / RECORD).stat().st_mtime),
            any_step=bool(record.get("any_step", False)),
            has_t5=spec.has_t5,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TeacherError(f"{spec.folder}/{RECORD} lacks or garbles {error}; export the student again") from None


class OneStepPipeline:
    """A student on a device. Every stage is a method of its own, so that a server can overlap them.

    Stages compute blocks of as many images as a rung of `ladder` says, and fill the last one up. Matrix products round
    differently in blocks of different size, so with one rung a prompt and a seed give the same image, to the bit, alone
    and in any batch; with several, images may differ in their last bits and a lone one costs less.
    """

    def __init__(
        self,
        spec: OneStepSpec,
        text: SD3TextEncoder,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL | AutoencoderTiny,
        runtime: Runtime,
        tiny_vae: str | None = None,
    ) -> None:
        """`runtime` names its ladder; `tiny_vae` is the digest of a VAE that is not the student's own."""
        self.spec = spec
        self.ladder = tuple(sorted(runtime.ladder))
        self.computed = runtime.label(transformer.device, tiny_vae)  # what images depend on besides the files
        self._text = text
        self._transformer = transformer
        self._vae = vae
        # Convolutions on a CPU gain nothing from company, and larger blocks leave its caches.
        self._decode_ladder = (1,) if vae.device.type == "cpu" else self.ladder
        self._merger = Merger(transformer)
        self._runtime = runtime
        self._network: Callable[..., Tensor] = self._velocity
        self._decoder: Callable[..., Tensor] = self._pixels
        if runtime.cuda_graphs:
            self._network, self._decoder = Graphed(self._velocity), Graphed(self._pixels)

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu", runtime: Runtime = Runtime()) -> Self:
        """Load a student folder and have it computed as `runtime` says.

        Raises TeacherError for a folder that is not a whole student, ConfigError naming the choice of `runtime` that
        cannot be had.
        """
        spec = read_student(folder)
        device = torch.device(device)
        runtime.check(device, spec.has_t5)
        dtype = runtime.dtype(device)
        text = SD3TextEncoder.load(folder, device, dtype, spec.max_sequence_length, runtime.t5)
        transformer = load_transformer(folder, dtype, device)
        if spec.any_step:
            load_second_time(transformer, Path(folder))
        attention.use(runtime.attention, transformer)
        quantize.use(runtime.quantize, transformer)
        tiny = None
        if runtime.tiny_vae is None:
            vae = load_vae(folder, dtype, device)
        else:
            vae, tiny = load_tiny_vae(runtime.tiny_vae, spec.latent_channels, spec.vae_scale_factor, dtype, device)
        if runtime.channels_last:
            vae.to(memory_format=torch.channels_last)
        if not runtime.ladder:
            runtime = replace(runtime, ladder=(4,) if spec.image_tokens < FILLING_TOKENS else (1,))
        if runtime.compile:
            shapes = len(runtime.ladder) * len(spec.sizes)
            transformer.compile(dynamic=False, recompile_limit=shapes)
            vae.decoder.compile(dynamic=False, recompile_limit=shapes)
        return cls(spec, text, transformer, vae, runtime, tiny)

    def read_adapter(self, folder: Path | str) -> Adapter:
        """A LoRA adapter for this student. Safe beside a batch.

        Raises TeacherError for one of another transformer, ConfigError where the weights are quantized.
        """
        if self._runtime.quantize != "none":
            raise ConfigError(
                f"quantize {self._runtime.quantize}: adapters are merged into whole weights; set it to none"
            )
        return read_adapter(folder, self._transformer)

    def adapt(self, adapter: Adapter | None, scale: float = 1.0) -> None:
        """Make the latents that follow with an adapter, or with none."""
        self._merger.merge(adapter, scale)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """For each prompt, whether the model sees only its beginning."""
        return self._text.truncated(prompts)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """CLIP tokens of each prompt as the model sees it, start and end included."""
        return self._text.count_tokens(prompts)

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Conditions of prompts, one row each."""
        parts = [self._text.encode([prompts[i] for i in block]) for block in _blocks(len(prompts), self.ladder)]
        return TextCondition.cat(parts)[: len(prompts)]

    @torch.no_grad()
    def latents(
        self,
        cond: TextCondition,
        seeds: Sequence[int],
        width: int | None = None,
        height: int | None = None,
        steps: int = 1,
    ) -> Tensor:
        """`steps` calls of the network for each image, over even times: latents (B, C, h, w).

        Raises SizeError for a size not made for, ConfigError for more steps than the student was made for, ValueError
        when there is not a seed for each condition.
        """
        if len(cond) != len(seeds):
            raise ValueError(f"{len(cond)} conditions need as many seeds, not {len(seeds)}")
        self.spec.check_steps(steps)
        width, height = self.size(width, height)
        factor = self.spec.vae_scale_factor
        z = noise(seeds, (self.spec.latent_channels, height // factor, width // factor))
        z = to_device(z, self._transformer.device)

        def v(x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
            return self._network(x_t, t, cond.embeds, cond.pooled)

        if steps == 1:
            return torch.cat([one_step(v, z[block], cond[block]) for block in _blocks(len(z), self.ladder)])[: len(z)]
        times = torch.linspace(1, 0, steps + 1, device=z.device)
        parts = []
        for block in _blocks(len(z), self.ladder):
            x = z[block]
            for t, s in pairwise(times):
                x = jump(v, x, t.expand(len(x)), s.expand(len(x)), cond[block])
            parts.append(x)
        return torch.cat(parts)[: len(z)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, uint8 (B, H, W, 3) on the CPU; rounded on the device, a quarter of the bytes to move.

        Raises DivergedError when one of them is not finite.
        """
        parts, finite = [], []
        for block in _blocks(len(latents), self._decode_ladder):
            pixels = self._decoder(latents[block]).float()
            finite.append(pixels.isfinite().all())
            parts.append(pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
        if not torch.stack(finite).all():
            where = f"{self.spec.name} in {self._vae.dtype}"
            raise DivergedError(
                f"{where} gave an image that is not finite: its VAE overflows, or weights are damaged; "
                "take precision fp32"
            )
        return to_host(torch.cat(parts)[: len(latents)])

    def size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """The size meant, the native one for None. Raises SizeError for one that the student was not trained for."""
        native = self.spec.sizes[0]
        asked = (native[0] if width is None else width, native[1] if height is None else height)
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
        steps: int = 1,
    ) -> Tensor:
        """Images, uint8 (B, H, W, 3), of prompts and seeds; more `steps` than one for a student of any step."""
        return self.decode(self.latents(self.encode(prompts), seeds, width, height, steps))

    def _velocity(self, x_t: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        return velocity(self._transformer, x_t, t, TextCondition(embeds, pooled))

    def _pixels(self, latents: Tensor) -> Tensor:
        return decode_latents(self._vae, latents)


def _blocks(count: int, ladder: Sequence[int]) -> Iterator[Tensor]:
    """Indices of the rows to compute together, as many as a rung; the last block repeats the last row until full."""
    start = 0
    while start < count:
        size = next((rung for rung in ladder if rung >= count - start), ladder[-1])
        yield torch.arange(start, start + size).clamp(max=count - 1)
        start += size
