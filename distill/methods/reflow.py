"""Rectified flow on the teacher's pairs (Liu, Gong, Liu; arXiv 2209.03003).

The guided teacher's own ODE takes noise z to x_0; the student regresses its velocity onto the straight line between:

    |v(x_t, t) - (z - x_0)|^2,    x_t = (1 - t) x_0 + t z

`reflow`, the paper's first stage, does so at every t: the student's paths become straighter, and it is still a flow.
`distillation`, the second, does so at t = 1 alone, which is plain regression from noise to image in one step. No fake
learns. Pairs are made as they are needed and used once.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from distill.flow import interpolate, x_0_from_velocity
from distill.methods.base import Batch, Loss, Turn, Velocities
from distill.methods.policies import TeacherGuidance, Times, dot, guided_teacher
from distill.models.teacher import sample
from distill.settings import Settings


class Config(Settings):
    """The paper's two stages, and the teacher's ODE: its steps and its scheduler's shift, which is 3 for SD3.

    `times` are those of the stage `reflow`; the paper's are uniform.
    """

    name: Literal["reflow"] = "reflow"
    stage: Literal["reflow", "distillation"] = "distillation"
    times: Times = Times(distribution="uniform")
    guidance: TeacherGuidance = TeacherGuidance()
    teacher_steps: Annotated[int, Field(ge=1)] = 28
    teacher_shift: Annotated[float, Field(gt=0)] = 3.0

    def turns(self) -> tuple[Turn, ...]:
        """The student alone learns."""
        return (Turn("student", 1, self.student_loss),)

    def student_loss(self, nets: Velocities, batch: Batch) -> Loss:
        """|v - (z - x_0)|^2 on pairs of the teacher's, which carry no gradient."""
        z = batch.z
        u = guided_teacher(self.guidance, nets, batch.draw)
        x_0 = sample(u, z, batch.cond, self.teacher_steps, self.teacher_shift)
        if self.stage == "distillation":
            t = torch.ones(len(z), device=z.device)
        else:
            t = self.times.sample(batch.draw).to(z.device)
        x_t = interpolate(x_0, z, t)
        w = z - x_0
        v = nets.student(x_t, t, batch.cond)
        error = dot(v - w, v - w)
        return Loss(error.mean(), {"t": t, "regression": error.detach()}, x_0_from_velocity(x_t, v, t).detach())
