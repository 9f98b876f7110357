"""What `RuntimeOptions` mean on a device: the check, the values of `auto`, and the fingerprint of images."""

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from distill.errors import ConfigError
from distill.models import attention, quantize
from distill.options import RuntimeOptions
from distill.student.spec import OneStepSpec

FULL_LOAD_TOKENS = 1024  # one image of this many tokens keeps a device busy; smaller ones are batched by default
DEFAULT_BATCH = 4  # images in a batch of smaller ones
SMALL_DECODER_BATCH = 2  # of them, on CPUs; a single image takes little longer
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WITHOUT_MEASUREMENT = {"attention": "sdpa", "channels_last": False, "compile": False, "cuda_graphs": False}

Size = tuple[int, int]  # width and height of an image in pixels
BatchSizes = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)
]  # that a stage computes, in ascending order; the last batch is padded to one of them


class SizeBatches(BaseModel):
    """Batch sizes of the stages that depend on the image size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size
    network: BatchSizes
    decoder: BatchSizes


class RuntimeChoice(BaseModel):
    """Runtime options without `auto`, and the batch sizes of every stage. Images depend on all of it to the bit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: RuntimeOptions
    text: BatchSizes
    sizes: tuple[SizeBatches, ...]

    def of(self, size: Size) -> SizeBatches:
        """Return the batch sizes for an image size. Raises KeyError for one that the choice lacks."""
        for each in self.sizes:
            if each.size == size:
                return each
        raise KeyError(size)

    @property
    def description(self) -> str:
        """The values that are measured, for logs."""
        options = self.options
        switches = [name for name in ("channels_last", "compile", "cuda_graphs") if getattr(options, name)]
        sizes = [
            f"{width}x{height}: network batch {_joined(each.network)}, decoder batch {_joined(each.decoder)}"
            for each in self.sizes
            for width, height in [each.size]
        ]
        text = f"text batch {_joined(self.text)}"
        return ", ".join([options.precision, f"attention {options.attention}", *switches, text, *sizes])


def _joined(sizes: BatchSizes) -> str:
    return "/".join(map(str, sizes))


def compute_dtype(options: RuntimeOptions, device: torch.device) -> torch.dtype:
    """Return the data type of weights and activations on a device."""
    return _DTYPES[_precision(options, device)]


def _precision(options: RuntimeOptions, device: torch.device) -> str:
    if options.precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return options.precision


def check(options: RuntimeOptions, device: torch.device, has_t5: bool) -> None:
    """Raise ConfigError naming the option that the device, or a student with or without T5, does not support."""
    dtype = compute_dtype(options, device)
    attention.check(options.attention, dtype, device, "attention")
    quantize.check(options.quantize, dtype, device, "quantize")
    if options.t5 != "full" and not has_t5:
        raise ConfigError(f"t5 {options.t5}: the student has no T5; leave t5 at full")
    if options.t5 == "int8":
        quantize.check("int8", dtype, device, "t5")
    if options.cuda_graphs is True and device.type != "cuda":
        raise ConfigError(f"cuda_graphs needs a CUDA device, not {device.type}; set it to false")


def unmeasured(options: RuntimeOptions, device: torch.device, spec: OneStepSpec) -> RuntimeChoice:
    """Choose for a student without measurement, so that the same options give the same images everywhere.

    On CPUs, batches and the memory format channels_last save little of a VAE's time, but about half of a small
    decoder's.
    """
    cpu, tokens = device.type == "cpu", spec.image_tokens
    small_decoder = spec.is_small(options.decoder)
    values = {name: value for name, value in _WITHOUT_MEASUREMENT.items() if getattr(options, name) == "auto"}
    if small_decoder and cpu and "channels_last" in values:
        values["channels_last"] = True
    resolved = options.model_copy(update={"precision": _precision(options, device), **values})
    network = options.batch_buckets or ((DEFAULT_BATCH,) if tokens < FULL_LOAD_TOKENS else (1,))
    on_cpu = (SMALL_DECODER_BATCH,) if small_decoder and tokens < FULL_LOAD_TOKENS else (1,)
    decoder = options.batch_buckets or (on_cpu if cpu else network)
    batches = tuple(SizeBatches(size=size, network=network, decoder=decoder) for size in spec.sizes)
    return RuntimeChoice(options=resolved, text=network, sizes=batches)


def fingerprint(choice: RuntimeChoice, small_decoder: str | None = None) -> str:
    """Name all that an image's bits depend on besides the student's files and the kind of device.

    Switches that are off are left out. `small_decoder` is the digest of the decoder that replaces the student's VAE.
    """
    options = choice.options
    parts = [options.precision, "text", *map(str, choice.text)]
    for each in choice.sizes:
        parts += [f"{each.size[0]}x{each.size[1]}", "network", *map(str, each.network)]
        parts += ["decoder", *map(str, each.decoder)]
    parts += ["attention", options.attention]
    changed = options.model_dump(exclude={"precision", "batch_buckets", "decoder", "attention"}, exclude_defaults=True)
    for name, value in changed.items():
        if value is not False:
            parts += [name] if value is True else [name, value]
    if small_decoder:
        parts += ["small-decoder", small_decoder[:16]]
    return "-".join(parts)
