"""How a student is computed on a device: every choice by its name, and what a device cannot do told by that name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from distill.errors import ConfigError
from distill.models import attention, quantize

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Choices that may change an image's last bits; `quantize`, `t5` and `tiny_vae` change what is seen."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 on GPUs, fp32 elsewhere
    ladder: tuple[int, ...] = ()  # images computed together; none is 4 of small ones, 1 of what fills a device alone
    attention: Literal["sdpa", "math", "flash", "xformers"] = "sdpa"
    quantize: Literal["none", "int8", "fp8"] = "none"  # the transformer's large matrices, by torchao
    t5: Literal["full", "int8", "cpu", "none"] = "full"  # int8 by torchao; none gives zeros, as stock without T5
    tiny_vae: Path | None = None  # folder of an AutoencoderTiny that decodes instead of the student's VAE
    channels_last: bool = False  # the VAE's convolutions
    compile: bool = False  # the network and the decoder by torch, for each rung and size when it is first met
    cuda_graphs: bool = False  # both recorded for each rung and size when it is first met, and replayed from then on

    def dtype(self, device: torch.device) -> torch.dtype:
        """Of weights and activations on a device."""
        if self.precision == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return _DTYPES[self.precision]

    def check(self, device: torch.device, has_t5: bool) -> None:
        """Raise ConfigError naming the choice that a device, or a student with or without T5, cannot have."""
        dtype = self.dtype(device)
        attention.check(self.attention, dtype, device, "attention")
        quantize.check(self.quantize, dtype, device, "quantize")
        if self.t5 != "full" and not has_t5:
            raise ConfigError(f"t5 {self.t5}: the student has no T5; leave t5 at full")
        if self.t5 == "int8":
            quantize.check(self.t5, dtype, device, "t5")
        if self.cuda_graphs and device.type != "cuda":
            raise ConfigError(f"cuda_graphs needs a CUDA device, not {device.type}; set it to false")

    def label(self, device: torch.device, tiny_vae: str | None = None) -> str:
        """One word for all that pixels depend on besides the student and the device; `tiny_vae` is that one's digest.

        Defaults are left out, but for the precision and the blocks.
        """
        names = {dtype: name for name, dtype in _DTYPES.items()}
        parts = [names[self.dtype(device)], "blocks", *map(str, sorted(self.ladder))]
        if self.attention != "sdpa":
            parts += ["attention", self.attention]
        if self.quantize != "none":
            parts += ["quantize", self.quantize]
        if self.t5 != "full":
            parts += ["t5", self.t5]
        if tiny_vae:
            parts += ["tiny-vae", tiny_vae[:16]]
        parts += [name for name in ("channels_last", "compile", "cuda_graphs") if getattr(self, name)]
        return "-".join(parts)
