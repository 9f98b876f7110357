"""Flow Generator Matching (Huang, Geng, Luo, Qi; arXiv 2410.19310).

Three velocity fields at x_t = (1 - t) x_0 + t eps, with x_0 = g(z) the student's image and w = eps - x_0: the frozen
teacher u, the fake v (the field of the student's own images), and the student, which enters through x_0.

    fake:     |v - w|^2                                  flow matching on the student's images, with its own eps
    student:  L1 = |u - v|^2                             eq. 4.11
              L2 = 2 <u - v, v - w>                      eq. 4.12
              L_alpha = <u - v, u - w> - alpha |u - v|^2

alpha = 0.5 is (L1 + L2) / 2, the paper's objective; alpha = 1 is L2 / 2, what the paper keeps for SD3 and SiD-DiT uses;
alpha = 1.2 is SiD's setting. Gradient flows through x_t into the inputs of u and v, and through w.

RealUID (ICLR 2026) adds real images x*_0, with w* = eps - x*_0, by two numbers a and b:

    fake:     a |v(x_t) - (b/a) w|^2 + (1 - a) |v(x*_t) - ((1 - b) / (1 - a)) w*|^2
    student:  a |u - (b/a) w|^2 - a |v - (b/a) w|^2

With the optimal fake the student minimizes the integral over x_t of (a p + (1 - a) p*) |u - v|^2, where p and p* are
the densities of noised student and real images. It is 0 for a student that makes the real images; a = b = 1 is 2 L_0.5.
"""

import logging
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distill.config_group import ConfigGroup
from distill.lazy_torch import torch
from distill.methods.base import Loss, TrainingBatch, UpdatePhase, Velocities
from distill.methods.policies import (
    WEIGHTS,
    Guidance,
    Times,
    add_noise,
    dot,
    fake_error,
    fake_loss,
    generate_x0,
    guided_velocities,
)

_Share = Annotated[float, Field(ge=0.85, le=1)]  # RealUID's range; below it the student's images hardly count
_log = logging.getLogger(__name__)


class RealUID(ConfigGroup):
    """How much real images count: `a` is the student's share in the fake's loss, `b` its share in the fake's target.

    The ratio b / a matters most. The authors' code takes 0.98 or 1.02 from the teacher on, 0.94 or 1.06 to fine-tune a
    finished student, and five fake steps per student step.
    """

    a: _Share
    b: _Share

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.a == 1 and self.b != 1:
            raise ValueError(f"a = 1 takes no real images, so b must be 1 too, not {self.b}")
        if self.a == self.b < 1:
            _log.warning("realuid: a = b = %s adds nothing to plain FGM; take b / a near 0.98 or 1.02", self.a)
        return self


class FGMConfig(ConfigGroup):
    """The settings of FGM."""

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
            raise ValueError(
                f"realuid is defined for alpha 0.5, not {self.alpha}; set alpha to 0.5, or leave realuid out"
            )
        if self.realuid is not None and self.realuid.a < 1 and self.guidance.scale != 1:
            _log.warning(
                "realuid: its theory assumes that the teacher's field is that of the real images, and guidance changes "
                "this field; set guidance.scale to 1, or compare with a run without realuid"
            )
        return self

    def update_phases(self) -> tuple[UpdatePhase, ...]:
        """The fake is updated first, then the student."""
        real = self.realuid is not None and self.realuid.a < 1
        return (
            UpdatePhase("fake", self.fake_steps, self.fake_loss, real=real),
            UpdatePhase("student", 1, self.student_loss),
        )

    def fake_loss(self, nets: Velocities, batch: TrainingBatch) -> Loss:
        """|v - w|^2 on the student's images; with RealUID, its loss on these and on real images."""
        if self.realuid is None or self.realuid.a == 1:
            return fake_loss(self.times, self.guidance, nets, batch)
        assert batch.real is not None  # the update phase declares it
        a, b, real = self.realuid.a, self.realuid.b, batch.real
        with torch.no_grad():
            x_0 = generate_x0(nets, batch)
        t, error = fake_error(self.times, self.guidance, nets, x_0, batch.cond, batch.draw, b / a)
        _, on_real = fake_error(self.times, self.guidance, nets, real.x_0, real.cond, batch.draw, (1 - b) / (1 - a))
        loss = a * error + (1 - a) * on_real  # (B,)
        return Loss(loss.mean(), {"t": t, "flow_matching": error.detach()}, x_0)

    def student_loss(self, nets: Velocities, batch: TrainingBatch) -> Loss:
        """L_alpha, weighted, with gradient through x_0; with RealUID, half of the student's loss above."""
        a, b = (1.0, 1.0) if self.realuid is None else (self.realuid.a, self.realuid.b)
        x_0 = generate_x0(nets, batch)
        x_t, t, eps = add_noise(self.times, x_0, batch.draw)
        w = eps - x_0  # (B, C, h, w), as u and v
        u, v = guided_velocities(self.guidance, nets, x_t, t, batch)

        gap = dot(u - v, u - v)  # (B,); eq. 4.11
        loss = a * (dot(u - v, u - b / a * w) - self.alpha * gap)  # alpha 0.5: (L1 + L2) / 2, eq. 4.11 and 4.12
        with torch.no_grad():
            weight = WEIGHTS[self.weight](x_0, x_t, t, u)
        return Loss((weight * loss).mean(), {"t": t, "gap": gap.detach()}, x_0.detach())
