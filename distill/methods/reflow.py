"""Rectified flow on the teacher's pairs of noise and image (Liu, Gong, Liu; arXiv 2209.03003).

The guided teacher's ODE takes noise z to x_0. The student's velocity v regresses onto the straight line between them:

    |v(x_t, t) - w|^2,    x_t = (1 - t) x_0 + t z,    w = z - x_0          eq. 1

Stage `reflow`, the paper's first, does so at every t: the student's paths become straighter, and it remains a flow.
Stage `distillation`, the second, does so at t = 1 alone: regression from noise to image in one step. There is no fake.
Each pair is made when it is needed and used once.
"""

from typing import Annotated, Literal

from pydantic import Field

from distill.config_group import ConfigGroup
from distill.flow import interpolate, x_0_from_velocity
from distill.lazy_torch import torch
from distill.methods.base import Loss, TrainingBatch, UpdatePhase, Velocities
from distill.methods.policies import TeacherGuidance, Times, dot, guided_at


class ReflowConfig(ConfigGroup):
    """The stage, and the teacher's ODE: its Euler steps and their time shift, by default that of its scheduler.

    `times` are those of stage `reflow`; the paper's are uniform.
    """

    name: Literal["reflow"] = "reflow"
    stage: Literal["reflow", "distillation"] = "distillation"
    times: Times = Times(distribution="uniform")
    guidance: TeacherGuidance = TeacherGuidance()
    teacher_steps: Annotated[int, Field(ge=1)] = 28
    teacher_shift: Annotated[float, Field(gt=0)] | None = None

    def update_phases(self) -> tuple[UpdatePhase, ...]:
        """Only the student is updated."""
        return (UpdatePhase("student", 1, self.student_loss),)

    def student_loss(self, nets: Velocities, batch: TrainingBatch) -> Loss:
        """|v - w|^2 on pairs of the teacher, which carry no gradient."""
        from distill.models.sd3 import sample  # which imports PyTorch and diffusers

        z = batch.z
        u = guided_at(self.guidance, nets.teacher, nets.null, self.guidance.sample_scale(batch.draw))
        x_0 = sample(u, z, batch.cond, self.teacher_steps, self.teacher_shift or nets.shift)
        if self.stage == "distillation":
            t = torch.ones(len(z), device=z.device)
        else:
            t = self.times.sample(batch.draw).to(z.device)
        x_t = interpolate(x_0, z, t)
        w = z - x_0
        v = nets.student(x_t, t, batch.cond)
        error = dot(v - w, v - w)
        return Loss(error.mean(), {"t": t, "regression": error.detach()}, x_0_from_velocity(x_t, v, t).detach())
