"""Flow map distillation (Boffi, Albergo, Vanden-Eijnden; arXiv 2406.07507), without data.

The student learns a mean velocity v(x, t, s), and with it the map along the guided teacher's ODE from any t to any s:

    X_{t,s}(x) = x + (s - t) v(x, t, s)

    lagrangian:  d/ds X_{t,s}(x) - u(X_{t,s}(x), s) = 0               v = u(X, s) - (s - t) dv/ds
    eulerian:    d/dt X_{t,s}(x) + grad X_{t,s}(x) u(x, t) = 0        v = u(x, t) + (s - t) (dv/dt + grad v u)

Each objective is written as the value that v must have. The residual against that right-hand side, held still, is
squared. Its value is the paper's loss, its gradient that of the continuous-time limit in Align Your Flow (arXiv
2506.14603) and of MeanFlow (2505.13447). No gradient goes through a derivative or through the teacher. Training spreads
from s = t, where v is the teacher's velocity, to longer jumps.

The derivative is one forward-mode pass. States x_t are the student's own, X_{1,t}(z) from noise without gradient, as in
FreeFlow (2511.19428), so training needs no images. For one step, the lagrangian objective needs only jumps from noise;
the others serve students of several steps. The eulerian objective has to reach t = 1 through all t below it, with
derivatives of the teacher's time embedding, and is the less stable one in all of these papers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distill.config_group import ConfigGroup
from distill.flow import between, derivative, expand, jump, x_0_from_velocity
from distill.lazy_torch import torch
from distill.methods.base import Loss, TrainingBatch, UpdatePhase, Velocities, Velocity
from distill.methods.policies import TeacherGuidance, Times, dot, guided_teacher

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 1e-3  # MeanFlow's constant in the adaptive weight


class FlowMapConfig(ConfigGroup):
    """The settings of flow map distillation.

    `from_noise` is the share of jumps that start at t = 1; the others' t is from `times`, and s uniform below t.
    `adaptive` divides each image's squared residual by its own size (MeanFlow).
    """

    name: Literal["flow_map"] = "flow_map"
    objective: Literal["lagrangian", "eulerian"] = "lagrangian"
    weight: Literal["adaptive", "uniform"] = "adaptive"
    from_noise: Annotated[float, Field(ge=0, le=1)] = 0.5
    times: Times = Times(distribution="uniform")
    guidance: TeacherGuidance = TeacherGuidance()

    @model_validator(mode="after")
    def _closed(self) -> Self:
        if self.objective == "eulerian" and self.from_noise == 1:
            raise ValueError("the eulerian objective is not complete from noise alone; set from_noise below 1")
        return self

    def update_phases(self) -> tuple[UpdatePhase, ...]:
        """Only the student is updated."""
        return (UpdatePhase("student", 1, self.student_loss, two_times=True, forward_mode=True),)

    def student_loss(self, nets: Velocities, batch: TrainingBatch) -> Loss:
        """The weighted squared residual of the objective; the logged images continue v from x_t to t = 0."""
        z, cond, draw = batch.z, batch.cond, batch.draw
        t = torch.where(draw.uniform() < self.from_noise, 1.0, self.times.sample(draw)).to(z.device)
        s = t * draw.uniform().to(z.device)
        u = guided_teacher(self.guidance, nets, draw)
        with torch.no_grad():
            x_t = z if self.from_noise == 1 else jump(nets.student, z, torch.ones_like(t), t, cond)
            target = OBJECTIVES[self.objective](nets.student, u, x_t, t, s, cond)

        v = nets.student(x_t, between(t, s), cond)
        residual = dot(v - target, v - target)
        weight = 1 / (residual.detach() + _SMALLEST) if self.weight == "adaptive" else torch.ones_like(t)
        x_0 = x_0_from_velocity(x_t, v.detach(), t)
        return Loss((weight * residual).mean(), {"t": t, "residual": residual.detach()}, x_0)


def _lagrangian(v: Velocity, u: Velocity, x_t: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
    """u(X_{t,s}, s) - (s - t) dv/ds."""
    duration = expand(s - t, x_t)
    mean, slope = derivative(lambda s: v(x_t, between(t, s), cond), (s,), (torch.ones_like(s),))
    return u(x_t + duration * mean, s, cond) - duration * slope


def _eulerian(v: Velocity, u: Velocity, x_t: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
    """u(x_t, t) + (s - t) (dv/dt + grad v u)."""
    duration = expand(s - t, x_t)
    w = u(x_t, t, cond)
    _, slope = derivative(lambda x, t: v(x, between(t, s), cond), (x_t, t), (w, torch.ones_like(t)))
    return w + duration * slope


OBJECTIVES: dict[str, Callable[[Velocity, Velocity, Tensor, Tensor, Tensor, Any], Tensor]] = {
    "lagrangian": _lagrangian,
    "eulerian": _eulerian,
}
