"""Devices, their fast precision, and copies to and from them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from distill.errors import ConfigError
from distill.models.allocator import keep_freed_memory


def resolve_device(name: str) -> torch.device:
    """The named device; `auto` is the first GPU, else the CPU, for which the process keeps freed memory.

    Raises ConfigError if this machine lacks the device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    there = (device.index or 0) < gpus if device.type == "cuda" else device.type in ("cpu", "mps")
    if not there:
        raise ConfigError(f"there is no device {name!r}: this machine has {gpus} GPUs; give auto, cpu, cuda or cuda:0")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32: on GPUs and CPUs with bf16 matrix units; others emulate it slowly."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 where the device computes it faster than fp32, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16) if fast_bfloat16(device) else nullcontext()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; from the CPU through pinned memory, without waiting for a GPU."""
    pinned = x.pin_memory() if (x.device.type, device.type) == ("cpu", "cuda") else x
    return pinned.to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """Copy to the CPU and wait; from a GPU into pinned memory, at the full speed of the bus."""
    if x.device.type != "cuda":
        return x.cpu()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return host
