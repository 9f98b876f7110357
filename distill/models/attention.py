"""Attention kernels, chosen by name.

diffusers' own choice of backends has no effect on Stable Diffusion 3, whose joint attention calls torch's
`scaled_dot_product_attention` directly. So torch's kernels are selected around that call, and xformers' by diffusers'
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

_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def resolve(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Choose the kernel of `auto` for training, by the measurements of `benchmarks/precision.py`; other names stay."""
    if name != "auto":
        return name
    return "math" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def check(name: str, dtype: torch.dtype, device: torch.device, setting: str = "networks.attention") -> None:
    """Raise ConfigError, naming the setting, unless the named kernel runs here; torch's are tried out."""
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
    """Set the kernel of all attention layers of a transformer; `sdpa` leaves the choice to torch."""
    if name == "sdpa":
        model.set_attn_processor(JointAttnProcessor2_0())
    elif name == "xformers":
        model.set_attn_processor(XFormersJointAttnProcessor())
    elif name == "math":
        model.set_attn_processor(MatrixAttention())
    elif name in _KERNELS:
        model.set_attn_processor(_JointAttention(_KERNELS[name]))


class _JointAttention(JointAttnProcessor2_0):  # type: ignore[misc]
    """diffusers' joint attention on one of torch's kernels, also when gradient checkpointing recomputes a block."""

    def __init__(self, kernel: SDPBackend) -> None:
        super().__init__()
        self._kernel = kernel

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **more: Any
    ) -> Any:
        with sdpa_kernel(self._kernel):
            return super().__call__(attn, hidden_states, encoder_hidden_states, **more)


class MatrixAttention:
    """Joint attention as two matrix products and a softmax.

    PyTorch's fused attention on CPUs has a slow bf16 backward pass: without it a training step takes half the time.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **more: Any
    ) -> Any:
        """Attend image tokens (B, N, D) and, in joint blocks, text tokens (B, L, D); shapes are kept."""

        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], attn.heads, -1).transpose(1, 2)  # (B, H, N, D / H)

        def normed(norm: Any, x: Tensor) -> Tensor:
            out: Tensor = x if norm is None else norm(x)
            return out

        q = normed(attn.norm_q, heads(attn.to_q(hidden_states)))
        k = normed(attn.norm_k, heads(attn.to_k(hidden_states)))
        v = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            q = torch.cat([q, normed(attn.norm_added_q, heads(attn.add_q_proj(encoder_hidden_states)))], 2)
            k = torch.cat([k, normed(attn.norm_added_k, heads(attn.add_k_proj(encoder_hidden_states)))], 2)
            v = torch.cat([v, heads(attn.add_v_proj(encoder_hidden_states))], 2)

        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)  # (B, H, N + L, N + L)
        out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2).to(q.dtype)
        image, text = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)
