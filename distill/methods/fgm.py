"""Flow Generator Matching (Huang, Geng, Luo, Qi; arXiv 2410.19310).

Three velocity fields at x_t = (1 - t) x_0 + t eps, with x_0 = g(z) the student's image and w = eps - x_0:
teacher u (frozen), fake v (the field of what the student makes now), and the student through x_0 itself.

    fake:     |v - w|^2                                  plain flow matching on the student's images, fresh eps
    student:  L1 = |u - v|^2                             eq. 4.11
              L2 = 2 <u - v, v - w>                      eq. 4.12
              L_alpha = <u - v, u - w> - alpha |u - v|^2

alpha = 0.5 is (L1 + L2) / 2, the paper's objective; alpha = 1 is L2 / 2, what the paper keeps for SD3 and SiD-DiT uses;
alpha = 1.2 is SiD's setting. Gradient flows through x_t into the inputs of u and v, and through w.

RealUID (ICLR 2026) adds real images x*_0, with w* = eps - x*_0, by two numbers a and b:

    fake:     a |v(x_t) - (b/a) w|^2 + (1 - a) |v(x*_t) - ((1 - b) / (1 - a)) w*|^2
    student:  a |u - (b/a) w|^2 - a |v - (b/a) w|^2

so that, at the best fake, the student descends E over x_t of (a p + (1 - a) p*) |u - v|^2, with p and p* the densities
of noised student and real images: a student that makes the real images has reached zero. a = b = 1 is 2 L_0.5.
"""

import logging
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from distill.flow import interpolate
from distill.methods.base import Batch, Loss, Turn, Velocities
from distill.methods.policies import WEIGHTS, Guidance, Times, dot, flow_matching, guided_pair, made, noised, regression
from distill.settings import Settings

_Share = Annotated[float, Field(ge=0.85, le=1)]  # RealUID's range; below it the student's images lose their say
_log = logging.getLogger(__name__)


class RealUID(Settings):
    """How much real images count: `a` is the student's share in the fake's loss, `b` its share in the fake's target.

    b / a near 0.94 or 1.06 matters most. Wants three or more steps of the fake to each of the student.
    """

    a: _Share
    b: _Share

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.a == 1 and self.b != 1:
            raise ValueError(f"a = 1 takes no real images, so b must be 1 too, not {self.b}")
        if self.a == self.b < 1:
            _log.warning("realuid: a = b = %s adds nothing to plain FGM; take b / a near 0.94 or 1.06", self.a)
        return self


class Config(Settings):
    """FGM's choices; every one is a named setting from the literature."""

    name: Literal["fgm"] = "fgm"
    alpha: Annotated[float, Field(ge=0, le=2)] = 1.0
    weight: Literal["velocity-uniform", "one-minus-t", "inverse-l1"] = "inverse-l1"
    times: Times = Times()
    guidance: Guidance = Guidance()
    fake_steps: Annotated[int, Field(ge=1)] = 1
    realuid: RealUID | None = None

    @model_validator(mode="after")
    def _justified(self) -> Self:
        if self.realuid is not None and self.alpha != 0.5:
            raise ValueError(f"realuid is only justified for alpha 0.5, not {self.alpha}; set alpha or leave it out")
        return self

    def turns(self) -> tuple[Turn, ...]:
        """The fake keeps up first, then the student moves."""
        real = self.realuid is not None and self.realuid.a < 1
        return (Turn("fake", self.fake_steps, self.fake_loss, real=real), Turn("student", 1, self.student_loss))

    def fake_loss(self, nets: Velocities, batch: Batch) -> Loss:
        """|v - w|^2 on the student's images; RealUID's on these and on real ones."""
        if self.realuid is None or self.realuid.a == 1:
            return flow_matching(self.times, self.guidance, nets, batch)
        assert batch.real is not None  # the turn asks for them
        a, b, real = self.realuid.a, self.realuid.b, batch.real
        with torch.no_grad():
            x_0 = made(nets, batch)
        t, error = regression(self.times, self.guidance, nets, x_0, batch.cond, batch.draw, b / a)
        _, on_real = regression(self.times, self.guidance, nets, real.x_0, real.cond, batch.draw, (1 - b) / (1 - a))
        loss = a * error + (1 - a) * on_real
        return Loss(loss.mean(), {"t": t, "flow_matching": error.detach()}, x_0)

    def student_loss(self, nets: Velocities, batch: Batch) -> Loss:
        """L_alpha, weighted, at the student's images, which carry the gradient; RealUID's is half of the above."""
        a, b = (1.0, 1.0) if self.realuid is None else (self.realuid.a, self.realuid.b)
        x_0 = made(nets, batch)
        t, eps = noised(self.times, x_0, batch.draw)
        x_t = interpolate(x_0, eps, t)
        w = eps - x_0
        u, v = guided_pair(self.guidance, nets, x_t, t, batch)

        gap = dot(u - v, u - v)
        loss = a * (dot(u - v, u - b / a * w) - self.alpha * gap)
        with torch.no_grad():
            weight = WEIGHTS[self.weight](x_0, x_t, t, u)
        return Loss((weight * loss).mean(), {"t": t, "gap": gap.detach()}, x_0.detach())
