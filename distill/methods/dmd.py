"""Distribution matching distillation (Yin et al.; arXiv 2311.18828, and 2405.14867 without its adversarial head).

The student moves its images along the difference of two scores, teacher's and fake's, taken at a noised copy:

    dL/dx_0 = (f_v - f_u) / mean |x_0 - f_u|,    f = x_t - t velocity

Averaged over x_t this is, but for the divisor, t^2 / (1 - t)^2 times the gradient of KL(student || teacher) at time t.
Nothing goes back through either network, which makes a step cheaper than FGM's by two backward passes. The fake
learns as in FGM; DMD2 lets it take five steps for each one of the student.
"""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from distill.flow import interpolate, x_0_from_velocity
from distill.methods import Batch, Loss, Turn, Velocities
from distill.policies import Guidance, Times, dot, flow_matching, guided_pair, made, noised


class Config(BaseModel):
    """DMD2's choices; `normalise` divides each image's direction by its mean |x_0 - f_u|."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["dmd"] = "dmd"
    normalise: bool = True
    times: Times = Times(law="uniform")
    guidance: Guidance = Guidance()
    fake_steps: Annotated[int, Field(ge=1)] = 5

    def turns(self) -> tuple[Turn, ...]:
        """The fake keeps up first, then the student moves."""
        return (Turn("fake", self.fake_steps, self.fake_loss), Turn("student", 1, self.student_loss))

    def fake_loss(self, nets: Velocities, batch: Batch) -> Loss:
        """|v - w|^2 on the student's images."""
        return flow_matching(self.times, self.guidance, nets, batch)

    def student_loss(self, nets: Velocities, batch: Batch) -> Loss:
        """<direction, x_0> with the direction held, at the student's images, which carry the gradient."""
        x_0 = made(nets, batch)
        with torch.no_grad():
            t, eps = noised(self.times, x_0, batch.draw)
            x_t = interpolate(x_0, eps, t)
            u, v = guided_pair(self.guidance, nets, x_t, t, batch)
            f_u, f_v = x_0_from_velocity(x_t, u, t), x_0_from_velocity(x_t, v, t)
            error = (x_0 - f_u).abs().flatten(1).mean(1)  # per image, never over the batch
            weight = 1 / error.clamp(min=1e-3) if self.normalise else torch.ones_like(t)
        loss = weight * dot(f_v - f_u, x_0)
        return Loss(loss.mean(), {"t": t, "gap": dot(u - v, u - v)}, x_0.detach())
