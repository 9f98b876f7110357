"""DMD2's critic: a small head on the fake's features says whether a noised image is real or the student's.

The features are the image tokens' hidden states after the last MM-DiT block. They are taken where they enter the
output layer, which stands outside of whatever the blocks are wrapped in: gradient checkpointing or compilation.
"""

from typing import Any, Self

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from distill.models.teacher import velocity


class Head(nn.Module):
    """Each token through one layer, their mean to a logit; in fp32. It starts at 0, where it moves nobody."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.token = nn.Linear(width, width)
        self.logit = nn.Linear(width, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    @classmethod
    def of(cls, transformer: SD3Transformer2DModel) -> Self:
        """A fresh head for a transformer, beside it."""
        return cls(transformer.inner_dim).to(transformer.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, tokens, width) to logits (B,)."""
        tokens = F.silu(self.token(self.norm(hidden.float())))
        logit: Tensor = self.logit(tokens.mean(1))
        return logit.float().squeeze(1)


def logits(transformer: SD3Transformer2DModel, head: Head, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    """Logits (B,) of noised images x_t (B, C, h, w) being real."""
    seen: list[Tensor] = []

    def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    hook = transformer.norm_out.register_forward_pre_hook(see)
    try:
        velocity(transformer, x_t, t, cond)
    finally:
        hook.remove()
    out: Tensor = head(seen[0])
    return out
