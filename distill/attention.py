"""Which kernel computes attention, by the name that a configuration gives it.

diffusers' own choice of backends does not reach Stable Diffusion 3: its joint attention calls torch's
`scaled_dot_product_attention` itself. So torch's kernels are chosen around that call, and xformers' by diffusers'
processor for it.
"""

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0, XFormersJointAttnProcessor
from diffusers.utils import is_xformers_available
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from distill.errors import ConfigError

_KERNELS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}


def check(name: str, dtype: torch.dtype, device: torch.device, setting: str = "networks.attention") -> None:
    """Raise ConfigError, naming the setting, unless the named kernel runs here; torch's are tried."""
    if name == "xformers" and not (is_xformers_available() and device.type == "cuda"):
        raise ConfigError(
            f"{setting} xformers needs the package xformers and a CUDA device, not {device.type}; "
            "install it there, or take sdpa"
        )
    if name in _KERNELS:
        row = torch.zeros(1, 1, 8, 64, dtype=dtype, device=device)
        try:
            with sdpa_kernel(_KERNELS[name]):
                scaled_dot_product_attention(row, row, row)
        except RuntimeError as error:
            raise ConfigError(
                f"{setting} {name} cannot run in {dtype} on {device.type} ({error}); take sdpa, or precision bf16"
            ) from None


def use(name: str, model: SD3Transformer2DModel) -> None:
    """Have all of a transformer's attention computed by the named kernel; `sdpa` leaves the choice to torch."""
    if name == "xformers":
        model.set_attn_processor(XFormersJointAttnProcessor())
    elif name in _KERNELS:
        model.set_attn_processor(_JointAttention(_KERNELS[name]))


class _JointAttention(JointAttnProcessor2_0):  # type: ignore[misc]
    """diffusers' joint attention on one of torch's kernels, also where a checkpointed block runs again."""

    def __init__(self, kernel: SDPBackend) -> None:
        super().__init__()
        self._kernel = kernel

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **more: Any
    ) -> Any:
        with sdpa_kernel(self._kernel):
            return super().__call__(attn, hidden_states, encoder_hidden_states, **more)
