"""Choices that distillation methods share: times, guidance, weights, and how the fake keeps up.

Each is a named setting from the literature; velocities are u (teacher), v (fake) and w = eps - x_0, as in `flow.py`.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.flow import interpolate, one_step, shift_time, x_0_from_velocity
from distill.methods.base import Batch, Loss, Velocities, Velocity
from distill.philox import Draw
from distill.settings import Settings

_Scale = Annotated[float, Field(ge=1, le=100)]
_Time = Annotated[float, Field(ge=0, le=1)]


class Times(Settings):
    """Where on [0, 1] the losses look.

    `logit-normal` is sigmoid(N(mean, std)), then shifted; SiD-DiT takes mean ln 2 and std 1.6, SD3 shifts by 3.
    `uniform` ignores mean and std. The clamp keeps 1/t and the ends' vanishing signal at bay.
    """

    distribution: Literal["logit-normal", "uniform"] = "logit-normal"
    mean: float = 0.6931
    std: Annotated[float, Field(gt=0)] = 1.6
    shift: Annotated[float, Field(gt=0)] = 1.0
    low: Annotated[float, Field(gt=0, lt=1)] = 0.02
    high: Annotated[float, Field(gt=0, lt=1)] = 0.98

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be less than high, not {self.low} and {self.high}")
        return self

    def sample(self, draw: Draw) -> Tensor:
        """Times (B,)."""
        t = draw.uniform() if self.distribution == "uniform" else torch.sigmoid(draw.normal(()) * self.std + self.mean)
        return shift_time(t, self.shift).clamp(self.low, self.high)


class TeacherGuidance(Settings):
    """The target velocity field: the teacher's, with classifier-free guidance.

    `scale` is one scale, or a range to draw from per image (SenseFlow: 2 to 8); 1 is no guidance. There is no guidance
    outside of `interval` in t either.
    """

    scale: _Scale | tuple[_Scale, _Scale] = 4.5
    interval: tuple[_Time, _Time] = (0.0, 1.0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, pair in (("scale", self.scale), ("interval", self.interval)):
            if isinstance(pair, tuple) and pair[0] > pair[1]:
                raise ValueError(f"{name} must go from low to high, not from {pair[0]} to {pair[1]}")
        return self

    def drawn(self, draw: Draw) -> Tensor | float:
        """A scale for each image (B,), or the one of all."""
        if isinstance(self.scale, tuple):
            low, high = self.scale
            return low + (high - low) * draw.uniform()
        return self.scale

    def at(self, t: Tensor, scale: Tensor | float) -> Tensor | None:
        """What `drawn` gave, at times t (B,): 1 outside of the interval. None if the scale is 1: no image is guided."""
        if self.scale == 1:
            return None
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        return torch.where(inside, torch.ones_like(t) * scale, torch.ones_like(t))

    def scales(self, t: Tensor, draw: Draw) -> Tensor | None:
        """The scale of each image (B,), drawn for these times alone; None where no image is guided."""
        return self.at(t, self.drawn(draw))


class Guidance(TeacherGuidance):
    """Guidance of methods with a fake. `guide_fake` applies the teacher's scales to the fake too.

    DMD leaves the fake unguided; SiD-DiT guides it.
    """

    guide_fake: bool = False
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # for the fake's null prompt, when it is guided


def velocity_uniform(x_0: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """The paper's: 1 in velocity space, which is 1 / t^2 in x_0 space."""
    return torch.ones_like(t)


def one_minus_t(x_0: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """SiD-DiT's: (1 - t) in x_0 space, which is t^2 (1 - t) here."""
    return t**2 * (1 - t)


def inverse_l1(x_0: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """SiD's and DMD's: 1 / mean |x_0 - f_u| in x_0 space, for each image by itself."""
    error = (x_0 - x_0_from_velocity(x_t, u, t)).abs().flatten(1).mean(1)
    return t**2 / error.clamp(min=1e-3)


WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "velocity-uniform": velocity_uniform,
    "one-minus-t": one_minus_t,
    "inverse-l1": inverse_l1,
}


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Mean product over all but the batch: (B, ...) to (B,)."""
    return (a * b).flatten(1).mean(1)


def guided(field: Velocity, null: Any, x_t: Tensor, t: Tensor, cond: Any, scales: Tensor | None) -> Tensor:
    """null + scale (field - null) with a scale per image (B,); without scales the null half is not computed."""
    if scales is None:
        return field(x_t, t, cond)
    both = type(cond).cat([null.expand(len(x_t)), cond])
    empty, full = field(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return empty + scales.view(-1, *[1] * (x_t.ndim - 1)) * (full - empty)


def made(nets: Velocities, batch: Batch) -> Tensor:
    """The student's images x_0 = z - v(z, 1), in fp32; they carry gradient in the student's own turn."""
    return one_step(nets.student, batch.z, batch.cond).float()


def noised(times: Times, x_0: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Times t (B,) and fresh noise eps, shaped as `x_0`, on its device."""
    t = times.sample(draw).to(x_0.device)
    return t, draw.normal(x_0.shape[1:]).to(x_0.device)


def flow_matching(times: Times, guidance: Guidance, nets: Velocities, batch: Batch) -> Loss:
    """The fake's loss |v - w|^2 on the student's images, held still, with an eps of its own."""
    with torch.no_grad():
        x_0 = made(nets, batch)
    t, error = regression(times, guidance, nets, x_0, batch.cond, batch.draw)
    return Loss(error.mean(), {"t": t, "flow_matching": error.detach()}, x_0)


def regression(
    times: Times, guidance: Guidance, nets: Velocities, x_0: Tensor, cond: Any, draw: Draw, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Times t (B,) and the fake's |v - scale w|^2 (B,) on images x_0; some lose their captions if it is guided."""
    t, eps = noised(times, x_0, draw)
    if guidance.guide_fake:
        dropped = (draw.uniform() < guidance.caption_dropout).to(x_0.device)
        cond = cond.where(dropped, nets.null)
    target = scale * (eps - x_0)
    v = nets.fake(interpolate(x_0, eps, t), t, cond)
    return t, dot(v - target, v - target)


def guided_pair(guidance: Guidance, nets: Velocities, x_t: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Teacher's and fake's velocities u, v at x_t, each guided as the policy says."""
    scales = guidance.scales(t, batch.draw)
    u = guided(nets.teacher, nets.null, x_t, t, batch.cond, scales)
    v = guided(nets.fake, nets.null, x_t, t, batch.cond, scales if guidance.guide_fake else None)
    return u, v


def guided_teacher(guidance: TeacherGuidance, nets: Velocities, draw: Draw) -> Velocity:
    """The teacher as one field, whose images keep their scales wherever it is asked."""
    scale = guidance.drawn(draw)

    def u(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return guided(nets.teacher, nets.null, x_t, t, cond, guidance.at(t, scale))

    return u
