"""DMD2's critic: a small head on the fake's features that tells noised real images from the student's.

The features are the image tokens' hidden states after the last MM-DiT block. They are read at the input of the output
layer, which neither gradient checkpointing nor compilation wraps.
"""

from typing import Any, Self

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from distill.models.sd3 import velocity


class Head(nn.Module):
    """One layer per token, then a linear layer from their mean to a logit, in fp32; zero-initialized."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.token = nn.Linear(width, width)
        self.logit = nn.Linear(width, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    @classmethod
    def of(cls, transformer: SD3Transformer2DModel) -> Self:
        """A new head for a transformer, on its device."""
        return cls(transformer.inner_dim).to(transformer.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, tokens, width) to logits (B,)."""
        tokens = F.silu(self.token(self.norm(hidden.float())))
        logit: Tensor = self.logit(tokens.mean(1))
        return logit.float().squeeze(1)


def logits(transformer: SD3Transformer2DModel, head: Head, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    """Logits (B,) that noised images x_t (B, C, h, w) are real."""
    features: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        features.append(inputs[0])

    hook = transformer.norm_out.register_forward_pre_hook(keep)
    try:
        velocity(transformer, x_t, t, cond)
    finally:
        hook.remove()
    out: Tensor = head(features[0])
    return out
