"""Flow Generator Matching (Huang, Geng, Luo, Qi; arXiv 2410.19310).

Three velocity fields at x_t = (1 - t) x_0 + t eps, with x_0 = g(z) the student's image and w = eps - x_0:
teacher u (frozen), fake v (the field of what the student makes now), and the student through x_0 itself.

    fake:     |v - w|^2                                  plain flow matching on the student's images, fresh eps
    student:  L1 = |u - v|^2                             eq. 4.11
              L2 = 2 <u - v, v - w>                      eq. 4.12
              L_alpha = <u - v, u - w> - alpha |u - v|^2

alpha = 0.5 is (L1 + L2) / 2, the paper's objective; alpha = 1 is L2 / 2, what the paper keeps for SD3 and SiD-DiT uses;
alpha = 1.2 is SiD's setting. Gradient flows through x_t into the inputs of u and v, and through w.
"""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from distill.flow import interpolate
from distill.methods import Batch, Loss, Turn, Velocities
from distill.policies import WEIGHTS, Guidance, Times, dot, flow_matching, guided_pair, made, noised


class Config(BaseModel):
    """FGM's choices; every one is a named setting from the literature."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["fgm"] = "fgm"
    alpha: Annotated[float, Field(ge=0, le=2)] = 1.0
    weight: Literal["velocity-uniform", "one-minus-t", "inverse-l1"] = "inverse-l1"
    times: Times = Times()
    guidance: Guidance = Guidance()
    fake_steps: Annotated[int, Field(ge=1)] = 1

    def turns(self) -> tuple[Turn, ...]:
        """The fake keeps up first, then the student moves."""
        return (Turn("fake", self.fake_steps, self.fake_loss), Turn("student", 1, self.student_loss))

    def fake_loss(self, nets: Velocities, batch: Batch) -> Loss:
        """|v - w|^2 on the student's images."""
        return flow_matching(self.times, self.guidance, nets, batch)

    def student_loss(self, nets: Velocities, batch: Batch) -> Loss:
        """L_alpha, weighted, at the student's images, which carry the gradient."""
        x_0 = made(nets, batch)
        t, eps = noised(self.times, x_0, batch.draw)
        x_t = interpolate(x_0, eps, t)
        w = eps - x_0
        u, v = guided_pair(self.guidance, nets, x_t, t, batch)

        gap = dot(u - v, u - v)
        loss = dot(u - v, u - w) - self.alpha * gap
        with torch.no_grad():
            weight = WEIGHTS[self.weight](x_0, x_t, t, u)
        return Loss((weight * loss).mean(), {"t": t, "gap": gap.detach()}, x_0.detach())
