"""Adam for a role's tensors, in the form that a configuration names."""

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import Tensor

from distill.config import Optimizer
from distill.errors import ConfigError

_FUSED = ("cpu", "cuda", "mps", "xpu")  # where torch has Adam as one kernel for many tensors


def check(kind: str, device: torch.device) -> None:
    """Raise ConfigError unless the named kind runs on the device."""
    if kind == "adam-8bit" and not (device.type == "cuda" and find_spec("bitsandbytes")):
        raise ConfigError(
            f"optimizer.kind adam-8bit needs the package bitsandbytes and a CUDA device, not {device.type}; "
            "install it there, or take adam"
        )


def adam(tensors: Iterable[Tensor], config: Optimizer, rate: float) -> torch.optim.Optimizer:
    """Adam over `tensors`, which lie on one device. `adam-8bit` holds its two moments in a byte each."""
    tensors = list(tensors)
    if config.kind == "adam-8bit":
        from bitsandbytes.optim import Adam8bit  # an extra that only CUDA has

        eight: torch.optim.Optimizer = Adam8bit(tensors, lr=rate, betas=config.betas, eps=config.eps)
        return eight
    fused = tensors[0].device.type in _FUSED
    return torch.optim.Adam(tensors, lr=rate, betas=config.betas, eps=config.eps, fused=fused)
