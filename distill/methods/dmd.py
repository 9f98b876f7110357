"""Distribution matching distillation (Yin et al.; arXiv 2311.18828, and 2405.14867 with its adversarial head).

The student's images follow the difference of the fake's and the teacher's scores at a noised copy:

    dL/dx_0 = (f_v - f_u) / mean |x_0 - f_u|,    f = x_t - t velocity

Without the divisor, its mean over x_t is t^2 / (1 - t)^2 times the gradient of KL(student || teacher) at time t. No
gradient goes through either network, which saves two backward passes over FGM. The fake learns as in FGM; in DMD2 it
takes five steps per student step.

DMD2's `gan` adds a critic D, a head on the fake's own features, on noised images. It learns with the fake, and the
student is trained, through D, to make images that D takes for real:

    fake:     softplus(D(x_t, c)) + softplus(-D(x*_t, c*)) + mismatched softplus(D(x*_t, c))
    student:  1024 / (C h w) softplus(-D(x_t, c))

The factor makes the term as strong for latents of any size: DMD's gradient is a mean over the C h w elements of a
latent, and that of D is not. Here c are the prompts of the student's images x, and c* the captions of the real images
x*. The last term is not DMD2's: real images that do not show their prompt count as the student's (Reed et al., arXiv
1605.05396; GigaGAN, 2303.05511), so that the critic learns to compare image and prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from distill.config_group import ConfigGroup
from distill.flow import interpolate, x_0_from_velocity
from distill.lazy_torch import torch
from distill.methods.base import Loss, TrainingBatch, UpdatePhase, Velocities
from distill.methods.policies import Guidance, Times, add_noise, dot, fake_loss, generate_x0, guided_velocities

if TYPE_CHECKING:
    from torch import Tensor


class Gan(ConfigGroup):
    """Weights of the adversarial losses of fake and student, and of mismatched pairs; the defaults are DMD2's for SDXL.

    `student` is the weight for a latent of 1024 elements. DMD2's 0.005 for SDXL's 4 x 128 x 128 elements is 0.32 here.
    """

    fake: Annotated[float, Field(gt=0)] = 1e-2
    student: Annotated[float, Field(gt=0)] = 0.32
    mismatched: Annotated[float, Field(ge=0)] = 0.0


class DMDConfig(ConfigGroup):
    """The settings of DMD and DMD2. `normalize` divides each image's direction by its mean |x_0 - f_u|."""

    name: Literal["dmd"] = "dmd"
    normalize: bool = True
    times: Times = Times(distribution="uniform")
    guidance: Guidance = Guidance()
    fake_steps: Annotated[int, Field(ge=1)] = 5
    gan: Gan | None = None

    def update_phases(self) -> tuple[UpdatePhase, ...]:
        """The fake is updated first, then the student."""
        gan = self.gan is not None
        return (
            UpdatePhase("fake", self.fake_steps, self.fake_loss, real=gan, critic=gan),
            UpdatePhase("student", 1, self.student_loss, critic=gan),
        )

    def fake_loss(self, nets: Velocities, batch: TrainingBatch) -> Loss:
        """|v - w|^2 on the student's images, and the critic's loss on these and on real images, at the same times."""
        matched = fake_loss(self.times, self.guidance, nets, batch)
        if self.gan is None:
            return matched
        assert batch.real is not None  # the update phase declares it
        t, real = matched.metrics["t"], batch.real

        def logits(x_0: Tensor, cond: Any) -> Tensor:
            eps = batch.draw.normal(x_0.shape[1:]).to(x_0.device)
            return nets.critic(interpolate(x_0, eps, t), t, cond)

        softplus = torch.nn.functional.softplus
        critic = softplus(logits(matched.x_0, batch.cond)) + softplus(-logits(real.x_0, real.cond))
        if self.gan.mismatched:
            critic = critic + self.gan.mismatched * softplus(logits(real.x_0, batch.cond))
        loss = matched.value + self.gan.fake * critic.mean()
        return Loss(loss, {**matched.metrics, "critic": critic.detach()}, matched.x_0)

    def student_loss(self, nets: Velocities, batch: TrainingBatch) -> Loss:
        """<dL/dx_0, x_0> with gradient through x_0 alone, and the adversarial loss."""
        x_0 = generate_x0(nets, batch)
        x_t, t, _ = add_noise(self.times, x_0, batch.draw)
        with torch.no_grad():
            u, v = guided_velocities(self.guidance, nets, x_t, t, batch)
            f_u, f_v = x_0_from_velocity(x_t, u, t), x_0_from_velocity(x_t, v, t)
            error = (x_0 - f_u).abs().flatten(1).mean(1)  # (B,): per image, never over the batch
            weight = 1 / error.clamp(min=1e-3) if self.normalize else torch.ones_like(t)
        loss = weight * dot(f_v - f_u, x_0)  # (B,)
        metrics = {"t": t, "gap": dot(u - v, u - v)}
        if self.gan is not None:
            doubt = torch.nn.functional.softplus(-nets.critic(x_t, t, batch.cond))
            loss = loss + self.gan.student * 1024 / x_0[0].numel() * doubt
            metrics["doubt"] = doubt.detach()
        return Loss(loss.mean(), metrics, x_0.detach())
