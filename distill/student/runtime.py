"""What `RuntimeOptions` mean on a device: the data type, the check, and the fingerprint of the resulting images."""

import torch

from distill.errors import ConfigError
from distill.models import attention, quantize
from distill.options import RuntimeOptions

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(options: RuntimeOptions, device: torch.device) -> torch.dtype:
    """Return the data type of weights and activations on a device."""
    if options.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[options.precision]


def check(options: RuntimeOptions, device: torch.device, has_t5: bool) -> None:
    """Raise ConfigError naming the option that the device, or a student with or without T5, does not support."""
    dtype = compute_dtype(options, device)
    attention.check(options.attention, dtype, device, "attention")
    quantize.check(options.quantize, dtype, device, "quantize")
    if options.t5 != "full" and not has_t5:
        raise ConfigError(f"t5 {options.t5}: the student has no T5; leave t5 at full")
    if options.t5 == "int8":
        quantize.check("int8", dtype, device, "t5")
    if options.cuda_graphs and device.type != "cuda":
        raise ConfigError(f"cuda_graphs needs a CUDA device, not {device.type}; set it to false")


def fingerprint(options: RuntimeOptions, device: torch.device, small_decoder: str | None = None) -> str:
    """Name all that an image's bits depend on besides the student's files and the kind of device.

    Options at their defaults are left out, except the precision and the batch buckets. `small_decoder` is the
    digest of the decoder that replaces the student's VAE.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    parts = [names[compute_dtype(options, device)], "buckets", *map(str, options.batch_buckets)]
    changed = options.model_dump(exclude={"precision", "batch_buckets", "decoder"}, exclude_defaults=True)
    for name, value in changed.items():
        parts += [name] if value is True else [name, value]
    if small_decoder:
        parts += ["small-decoder", small_decoder[:16]]
    return "-".join(parts)
