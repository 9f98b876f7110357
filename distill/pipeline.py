"""`OneStepPipeline`: images from a student folder, prompts and seeds.

from distill.pipeline import OneStepPipeline, RuntimeOptions

pipeline = OneStepPipeline.load("runs/mine/student", "cuda", RuntimeOptions(precision="bf16"))
images = pipeline(["a red circle", "a blue star"], seeds=[1, 2])  # uint8 (2, H, W, 3), RGB, on the CPU
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel
from torch import Tensor

from distill.errors import ConfigError, DivergedError, SizeError
from distill.flow import jump, noise, one_step
from distill.models import attention, quantize
from distill.models.cuda_graphs import CudaGraphed
from distill.models.device import to_device, to_host
from distill.models.sd3 import decode_latents, load_transformer, velocity
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder, TextCondition
from distill.models.two_times import load_second_time
from distill.models.vae import to_bytes
from distill.options import SHIPPED_STUDENT as SHIPPED_STUDENT
from distill.options import RuntimeOptions as RuntimeOptions
from distill.student import runtime
from distill.student.adapters import Adapter as Adapter
from distill.student.adapters import Merger, read_adapter
from distill.student.decoder import load_decoder
from distill.student.spec import OneStepSpec as OneStepSpec
from distill.student.spec import read_record
from distill.student.spec import read_student as read_student

COMPILED_FORMS = 64  # of transformer blocks: three kinds of blocks, each batch and image size


class OneStepPipeline:
    """Generate images with a student on one device.

    Call the pipeline for whole images, or its stages one by one: `encode`, `latents`, `decode`. A server runs the
    stages of different batches at the same time; each stage may be called by one thread at a time.

    Every stage splits its inputs into batches of the sizes in `choice`; the last batch is padded. Matrix products round
    differently at some batch sizes. With one batch size for each stage and image size, or with those that
    `tuned_choice` found to round alike, an image is therefore bit-identical alone and in any batch. With others, images
    may differ in their last bits.
    """

    def __init__(
        self,
        spec: OneStepSpec,
        text: SD3TextEncoder,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL | AutoencoderTiny,
        choice: runtime.RuntimeChoice,
        small_decoder: str | None = None,
    ) -> None:
        """Wrap loaded networks; `load` does so for a folder. `small_decoder` is the digest of `vae` if it is one."""
        self.spec = spec
        self.small_decoder = small_decoder
        self._text = text
        self._transformer = transformer
        self._vae = vae
        self._merger = Merger(transformer)
        self._computed_as: RuntimeOptions | None = None
        self._network: Callable[..., Tensor]
        self._decoder: Callable[..., Tensor]
        self.use(choice)

    def use(self, choice: runtime.RuntimeChoice) -> None:
        """Compute as chosen from now on. Precision, `quantize`, `t5` and the decoder stay those of the loading."""
        if self._computed_as != choice.options:
            self._computed_as = None  # until it succeeds
            self._compute_as(choice.options)
        self._computed_as = choice.options
        self.choice = choice
        self.fingerprint = runtime.fingerprint(choice, self.small_decoder)

    def _compute_as(self, options: RuntimeOptions) -> None:
        attention.use(options.attention, self._transformer)
        memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self._vae.to(memory_format=memory_format)
        if options.cudnn_benchmark:
            torch.backends.cudnn.benchmark = True
        # Blocks of one kind share their compiled forms, so a deep transformer starts as fast as a shallow one.
        for module in (*self._transformer.transformer_blocks, self._vae.decoder):
            module.__dict__.pop("forward", None)
            if options.compile:
                torch._dynamo.config.recompile_limit = COMPILED_FORMS
                # Without timing kernels: results would differ between two starts.
                module.forward = torch.compile(module.forward, dynamic=False, options={"deterministic": True})
        # They do not refer to the pipeline, so that its memory is free as soon as nothing else refers to it.
        self._network = partial(_velocity, self._transformer)
        self._decoder = partial(_pixels, self._vae, memory_format)
        if options.cuda_graphs:
            self._network, self._decoder = CudaGraphed(self._network), CudaGraphed(self._decoder)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: torch.device | str = "cpu",
        options: RuntimeOptions | runtime.RuntimeChoice = RuntimeOptions(),
    ) -> Self:
        """Load a student folder onto a device: `cpu`, `cuda` or `cuda:1`.

        `options` are the caller's, or a choice that was made from them, as by `tuned_choice`. Raises TeacherError if
        the folder is no complete student, ConfigError naming the option that the device, the student or the
        installation does not support.
        """
        read = SD3Folder.read(folder)
        spec = read_record(read)
        device = torch.device(device)
        if isinstance(options, RuntimeOptions):
            choice = runtime.unmeasured(options, device, spec)
        else:
            choice, options = options, options.options
        runtime.check(options, device, spec.has_t5)
        dtype = runtime.compute_dtype(options, device)
        text = SD3TextEncoder.load(read, device, dtype, spec.max_sequence_length, options.t5)
        transformer = load_transformer(read, dtype, device)
        if spec.any_step:
            load_second_time(transformer, read.path)
        quantize.use(options.quantize, transformer)
        vae, small_decoder = load_decoder(read, spec, options.decoder, dtype, device)
        return cls(spec, text, transformer, vae, choice, small_decoder)

    @property
    def decoder(self) -> Literal["full", "small"]:
        """Return which decoder makes the images: the student's VAE, or a small one."""
        return "full" if self.small_decoder is None else "small"

    def read_adapter(self, path: Path | str) -> Adapter:
        """Read a LoRA adapter's file, or that of a folder, for this student. Safe while a batch runs.

        Raises TeacherError if the adapter does not fit the transformer, ConfigError if the weights are quantized.
        """
        if (kind := self.choice.options.quantize) != "none":
            raise ConfigError(f"quantize {kind}: adapters need unquantized weights; set it to none")
        return read_adapter(path, self._transformer)

    def adapt(self, adapter: Adapter | None, scale: float = 1.0) -> None:
        """Merge an adapter into the transformer for all following calls of `latents`; None removes it."""
        self._merger.merge(adapter, scale)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Return for each prompt whether it is longer than `spec.token_limit`, so that its end is ignored."""
        return self._text.truncated(prompts)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the CLIP tokens of each prompt after truncation, with start and end token."""
        return self._text.count_tokens(prompts)

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Encode prompts on the device; the result has one row per prompt and can be indexed and reused."""
        parts = [self._text.encode([prompts[i] for i in batch]) for batch in _batches(len(prompts), self.choice.text)]
        return TextCondition.cat(parts)[: len(prompts)]

    def noise(self, seeds: Sequence[int], width: int | None = None, height: int | None = None) -> Tensor:
        """Draw the noise (B, C, H / f, W / f) of seeds for `latents`, where f is `spec.vae_scale_factor`.

        A seed is an integer of up to 64 bits. `width` and `height` are pixels, one of `spec.sizes`; None is the native
        size. Noise is drawn on the CPU and copied to the device. Raises SizeError for an unsupported size.
        """
        width, height = self.size(width, height)
        factor = self.spec.vae_scale_factor
        z = noise(seeds, (self.spec.latent_channels, height // factor, width // factor))
        return to_device(z, self._transformer.device)

    @torch.no_grad()
    def latents(self, cond: TextCondition, z: Tensor, steps: int = 1) -> Tensor:
        """Generate latents from noise z, both (B, C, h, w) and on the device; `noise` draws it from seeds.

        `cond` has a row per image. `steps` is the number of network evaluations, at evenly spaced times.

        Raises SizeError for an unsupported size, ConfigError for an unsupported number of steps, ValueError if there
        is not one row of noise per condition.
        """
        if len(cond) != len(z):
            raise ValueError(f"{len(cond)} conditions need the noise of as many seeds, not of {len(z)}")
        self.spec.check_steps(steps)

        def v(x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
            return self._network(x_t, t, cond.embeds, cond.pooled)

        times = torch.linspace(1, 0, steps + 1, device=z.device)
        parts = []
        for batch in _batches(len(z), self._batch_sizes(z).network):
            x = z[batch]
            if steps == 1:
                x = one_step(v, x, cond[batch])
            else:
                for t, s in pairwise(times):
                    x = jump(v, x, t.expand(len(x)), s.expand(len(x)), cond[batch])
            parts.append(x)
        return torch.cat(parts)[: len(z)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to uint8 RGB (B, H, W, 3) on the CPU. Raises DivergedError unless finite."""
        parts, finite = [], []
        for pixels in self.pixels(latents):
            finite.append(pixels.isfinite().all())
            parts.append(to_bytes(pixels))  # on the device: a quarter of the bytes to copy
        if not torch.stack(finite).all():
            raise DivergedError(
                f"{self.spec.name} in {self._vae.dtype} gave an image that is not finite: its VAE overflows, or "
                "weights are damaged; set precision to fp32"
            )
        return to_host(torch.cat(parts)[: len(latents)])

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents (B, C, h, w) to fp32 RGB (b, 3, H, W) in about [-1, 1], on the device, batch by batch.

        The last batch has padding.
        """
        for batch in _batches(len(latents), self._batch_sizes(latents).decoder):
            yield self._decoder(latents[batch]).float()

    def size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Replace None by the native width and height. Raises SizeError unless the student supports the size."""
        native = self.spec.sizes[0]
        size = (native[0] if width is None else width, native[1] if height is None else height)
        if size not in self.spec.sizes:
            supported = ", ".join(f"{w}x{h}" for w, h in self.spec.sizes)
            raise SizeError(f"{self.spec.name} makes images of {supported}, not {size[0]}x{size[1]}")
        return size

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        width: int | None = None,
        height: int | None = None,
        steps: int = 1,
    ) -> Tensor:
        """Generate one RGB image per prompt and seed, uint8 (B, H, W, 3) on the CPU, as `latents` and `decode` do."""
        return self.decode(self.latents(self.encode(prompts), self.noise(seeds, width, height), steps))

    def _batch_sizes(self, latents: Tensor) -> runtime.SizeBatches:
        """Return the batch sizes for the image size of latents (B, C, h, w)."""
        height, width = latents.shape[-2:]
        factor = self.spec.vae_scale_factor
        return self.choice.of(self.size(width * factor, height * factor))


def _velocity(transformer: SD3Transformer2DModel, x_t: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    return velocity(transformer, x_t, t, TextCondition(embeds, pooled))


def _pixels(vae: AutoencoderKL | AutoencoderTiny, memory_format: torch.memory_format, latents: Tensor) -> Tensor:
    return decode_latents(vae, latents.contiguous(memory_format=memory_format))


def _batches(count: int, buckets: Sequence[int]) -> Iterator[Tensor]:
    """Yield the row indices of each batch. Its size is a bucket; the last batch repeats the last row as padding."""
    start = 0
    while start < count:
        size = next((bucket for bucket in buckets if bucket >= count - start), buckets[-1])
        yield torch.arange(start, start + size).clamp(max=count - 1)
        start += size
