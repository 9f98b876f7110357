"""8-bit matrices by torchao, chosen by name."""

import importlib.util

import torch
from torch import nn

from distill.errors import ConfigError

_FP8 = (8, 9)  # compute capability of the first GPUs whose matrix units take it
_LAYERS = {"attn", "attn2", "ff", "ff_context"}  # the parts of a transformer block that process tokens


def check(name: str, dtype: torch.dtype, device: torch.device, setting: str) -> None:
    """Raise ConfigError, naming the setting, unless the named kind works on this device with this dtype."""
    if name == "none":
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"{setting} {name} needs the package torchao; pip install torchao, or leave the setting out")
    if name == "fp8" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8):
        capability = ".".join(map(str, _FP8))
        needed = f"a GPU of compute capability {capability} or more"
        raise ConfigError(f"{setting} fp8 needs {needed}, not {device}; take int8 or none")
    if name == "fp8" and dtype != torch.bfloat16:
        raise ConfigError(f"{setting} fp8 computes beside bf16, not {dtype}; take precision bf16")


def use(name: str, transformer: nn.Module) -> None:
    """Quantize a transformer's attention and feed-forward matrices to 8 bits; `none` changes nothing.

    Products are computed in 8 bits too. Activations have a scale per token, so that an image does not depend on the
    other images of its batch.
    """
    if name == "none":
        return
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    kind = {"int8": Int8DynamicActivationInt8WeightConfig, "fp8": Float8DynamicActivationFloat8WeightConfig}[name]
    # torchao's compiler settings choose kernels by timing them: results would differ between two starts.
    quantize_(transformer, kind(granularity=PerRow(), set_inductor_config=False), _processes_tokens)


def quantize_weights(model: nn.Module, device: torch.device) -> None:
    """Move a model's matrices to the device and store them in int8; products are computed in the model's dtype."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), device=device)


def _processes_tokens(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not _LAYERS.isdisjoint(name.split("."))
