"""Rectified-flow math, without models.

Convention (Stable Diffusion 3's and diffusers'): t in [0, 1], t = 1 is noise, x_t = (1 - t) x_0 + t eps, and networks
predict the velocity w = eps - x_0 = dx_t/dt. The FGM paper runs time the other way; t here is 1 - t there.
Batches are (B, ...), times (B,).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from distill.lazy_torch import torch
from distill.philox import Draw

if TYPE_CHECKING:
    from torch import Tensor

Cond = TypeVar("Cond")


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times (B,) to multiply a batch (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def interpolate(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps."""
    t = expand(t, x_0)
    return (1 - t) * x_0 + t * eps


def x_0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_0 = x_t - t v."""
    return x_t - expand(t, x_t) * v


def shift_time(t: Tensor, s: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t), which adds ln s to logit(t); s > 1 shifts times towards noise."""
    return s * t / (1 + (s - 1) * t)


def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(seeds), *shape), fp32 on the CPU; a seed's noise does not depend on the other seeds.

    Seeds are integers from 0 to 2^64 - 1, each with different noise; raises ValueError for other values. Seeds below
    2^32 use torch's generator, which ignores all higher bits; larger ones use Philox.
    """
    rows = [_noise(operator.index(seed), tuple(shape)) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is a whole number from 0 to 2^64 - 1, not {seed}")
    if seed < 2**32:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Draw(seed, "noise", [0]).normal(shape)[0]


def one_step(velocity: Callable[[Tensor, Tensor, Cond], Tensor], z: Tensor, cond: Cond) -> Tensor:
    """x_0 = z - v(z, 1, cond): one Euler step from pure noise to data; differentiable in the velocity's weights."""
    return z - velocity(z, torch.ones(len(z), device=z.device), cond)


def guided_velocity(
    velocity: Callable[..., Tensor],
    null: Any,
    x_t: Tensor,
    t: Tensor,
    cond: Any,
    scale: Any,
    skip_layers: Sequence[int] = (),
    skip_scale: Any = None,
) -> Tensor:
    """v_null + scale (v - v_null) + skip_scale (v - v_skip), with one scale each or a scale per image (B,).

    `null` is the condition of the empty prompt, one row; v_null and v are one batched call. v_skip is the velocity
    without the blocks `skip_layers`, which `velocity` takes as a fourth argument. The network is not called for a
    term whose scale is None.
    """
    if scale is None:
        guided = v = velocity(x_t, t, cond)
    else:
        both = type(cond).cat([null.expand(len(x_t)), cond])
        v_null, v = velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        guided = v_null + _scaled(scale, v - v_null)
    if skip_scale is None:
        return guided
    return guided + _scaled(skip_scale, v - velocity(x_t, t, cond, skip_layers))


def _scaled(scale: Tensor | float, x: Tensor) -> Tensor:
    return (expand(scale, x) if isinstance(scale, torch.Tensor) else scale) * x


def between(t: Tensor, s: Tensor) -> Tensor:
    """Times (B, 2) for which a student of two times returns its mean velocity from t to s."""
    return torch.stack([t, s], 1)


def jump(velocity: Callable[[Tensor, Tensor, Cond], Tensor], x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """X_{t,s}(x_t) = x_t + (s - t) v(x_t, t, s): the flow map of a velocity that takes times (B, 2)."""
    return x_t + expand(s - t, x_t) * velocity(x_t, between(t, s), cond)


def derivative(f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """f and its directional derivative in forward mode, which fused attention and compiled blocks do not support."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        pair: tuple[Tensor, Tensor] = torch.func.jvp(f, at, along)  # type: ignore[assignment]
    return pair
