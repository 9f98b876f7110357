"""Distribution matching distillation (Yin et al.; arXiv 2311.18828, and 2405.14867 with its adversarial head).

The student moves its images along the difference of two scores, teacher's and fake's, taken at a noised copy:

    dL/dx_0 = (f_v - f_u) / mean |x_0 - f_u|,    f = x_t - t velocity

Averaged over x_t this is, but for the divisor, t^2 / (1 - t)^2 times the gradient of KL(student || teacher) at time t.
Nothing goes back through either network, which makes a step cheaper than FGM's by two backward passes. The fake
learns as in FGM; DMD2 lets it take five steps for each one of the student.

DMD2's `gan` puts a critic D, a head on the fake's own features, at noised images. It learns with the fake, and the
student's images, which carry gradient through it, are to pass for real:

    fake:     softplus(D(x_t)) + softplus(-D(x*_t))
    student:  softplus(-D(x_t))
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from distill.flow import interpolate, x_0_from_velocity
from distill.methods.base import Batch, Loss, Turn, Velocities
from distill.methods.policies import Guidance, Times, dot, flow_matching, guided_pair, made, noised
from distill.settings import Settings


class Gan(Settings):
    """Weights of the critic's loss beside the fake's, and of the student's beside its direction; SDXL's in DMD2."""

    fake: Annotated[float, Field(gt=0)] = 1e-2
    student: Annotated[float, Field(gt=0)] = 5e-3


class Config(Settings):
    """DMD2's choices; `normalize` divides each image's direction by its mean |x_0 - f_u|."""

    name: Literal["dmd"] = "dmd"
    normalize: bool = True
    times: Times = Times(distribution="uniform")
    guidance: Guidance = Guidance()
    fake_steps: Annotated[int, Field(ge=1)] = 5
    gan: Gan | None = None

    def turns(self) -> tuple[Turn, ...]:
        """The fake keeps up first, then the student moves."""
        gan = self.gan is not None
        return (
            Turn("fake", self.fake_steps, self.fake_loss, real=gan, critic=gan),
            Turn("student", 1, self.student_loss, critic=gan),
        )

    def fake_loss(self, nets: Velocities, batch: Batch) -> Loss:
        """|v - w|^2 on the student's images, and the critic's loss on these and real ones, at the same times."""
        matched = flow_matching(self.times, self.guidance, nets, batch)
        if self.gan is None:
            return matched
        assert batch.real is not None  # the turn asks for them
        t, real = matched.metrics["t"], batch.real

        def logits(x_0: Tensor, cond: Any) -> Tensor:
            eps = batch.draw.normal(x_0.shape[1:]).to(x_0.device)
            return nets.critic(interpolate(x_0, eps, t), t, cond)

        critic = softplus(logits(matched.x_0, batch.cond)) + softplus(-logits(real.x_0, real.cond))
        loss = matched.value + self.gan.fake * critic.mean()
        return Loss(loss, {**matched.metrics, "critic": critic.detach()}, matched.x_0)

    def student_loss(self, nets: Velocities, batch: Batch) -> Loss:
        """<direction, x_0> with the direction held, at the student's images, which carry the gradient."""
        x_0 = made(nets, batch)
        t, eps = noised(self.times, x_0, batch.draw)
        x_t = interpolate(x_0, eps, t)
        with torch.no_grad():
            u, v = guided_pair(self.guidance, nets, x_t, t, batch)
            f_u, f_v = x_0_from_velocity(x_t, u, t), x_0_from_velocity(x_t, v, t)
            error = (x_0 - f_u).abs().flatten(1).mean(1)  # per image, never over the batch
            weight = 1 / error.clamp(min=1e-3) if self.normalize else torch.ones_like(t)
        loss = weight * dot(f_v - f_u, x_0)
        metrics = {"t": t, "gap": dot(u - v, u - v)}
        if self.gan is not None:
            doubt = softplus(-nets.critic(x_t, t, batch.cond))
            loss = loss + self.gan.student * doubt
            metrics["doubt"] = doubt.detach()
        return Loss(loss.mean(), metrics, x_0.detach())
