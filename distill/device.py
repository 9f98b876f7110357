"""Where to compute, and in what precision."""

import torch


def resolve_device(name: str) -> torch.device:
    """The named device; `auto` is the first GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: on GPUs, and on CPUs whose matrix units take it.

    CPUs without such units emulate bf16, a hundred times slower.
    """
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
