"""Adam for a role's tensors, in the form that a configuration names.

On a GPU the learning rate and whether a step is taken are tensors, so that a CUDA graph of a training step holds for
every step. 8-bit Adam alone waits for the device, to know whether a step is skipped.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

from distill.config import Optimizer
from distill.errors import ConfigError

_FUSED = ("cpu", "cuda", "xpu")  # where torch has Adam as one kernel for many tensors that can skip a step


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
    device = tensors[0].device
    fused, cuda = device.type in _FUSED, device.type == "cuda"
    lr = torch.tensor(rate, device=device) if cuda else rate
    return torch.optim.Adam(tensors, lr=lr, betas=config.betas, eps=config.eps, fused=fused, capturable=cuda)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the steps that follow."""
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def step(optimizer: torch.optim.Optimizer, sound: Tensor) -> None:
    """Take a step where `sound` () is true, and leave weights and moments as they are where it is false."""
    if optimizer.param_groups[0].get("fused"):
        cast(Any, optimizer).found_inf = (~sound).float()  # as gradient scalers tell the kernel
        optimizer.step()
    elif bool(sound):
        optimizer.step()
