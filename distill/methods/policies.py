"""Choices that distillation methods share: times, guidance, weights, and the fake's loss.

Each is a named setting from the literature. Notation as in `flow.py`: x_t = (1 - t) x_0 + t eps and w = eps - x_0;
u is the teacher's velocity and v the fake's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distill.config_group import ConfigGroup
from distill.errors import ConfigError
from distill.flow import guided_velocity, interpolate, one_step, shift_time, x_0_from_velocity
from distill.lazy_torch import torch
from distill.methods.base import Loss, TrainingBatch, Velocities, Velocity
from distill.philox import Draw

if TYPE_CHECKING:
    from torch import Tensor

_Scale = Annotated[float, Field(ge=1, le=100)]
_Time = Annotated[float, Field(ge=0, le=1)]


class Times(ConfigGroup):
    """The distribution of t on [0, 1].

    `logit-normal` is sigmoid(N(mean, std)), then shifted; SiD-DiT takes mean ln 2 and std 1.6, SD3 shifts by 3.
    `uniform` ignores mean and std. The clamp bounds 1/t, and keeps away from the ends, where the signal vanishes.
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
        """Sample times (B,)."""
        uniform = self.distribution == "uniform"
        t = draw.uniform() if uniform else torch.sigmoid(draw.normal(()) * self.std + self.mean)
        return shift_time(t, self.shift).clamp(self.low, self.high)


class TeacherGuidance(ConfigGroup):
    """The target velocity field: the teacher's, with classifier-free and skip-layer guidance.

    `scale` is one scale, or a range from which each image's is sampled (SenseFlow: 2 to 8); 1 is no guidance. There is
    no guidance outside of `interval` in t either.

    Skip-layer guidance adds `skip_scale` times the difference to the velocity without the blocks `skip_layers`, inside
    of `skip_interval` in t. With a time shift s, the fraction f of the sampling steps is at t = `shift_time(1 - f, s)`.
    The default interval is 0.01 to 0.2 of the steps at shift 3, which is the default of diffusers' pipeline.
    """

    scale: _Scale | tuple[_Scale, _Scale] = 4.5
    interval: tuple[_Time, _Time] = (0.0, 1.0)
    skip_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    skip_scale: Annotated[float, Field(gt=0, le=100)] = 2.8
    skip_interval: tuple[_Time, _Time] = (0.9231, 0.9966)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("scale", "interval", "skip_interval"):
            pair = getattr(self, name)
            if isinstance(pair, tuple) and pair[0] > pair[1]:
                raise ValueError(f"{name} must go from low to high, not from {pair[0]} to {pair[1]}")
        if self.skip_layers and self.scale == 1:
            raise ValueError("skip_layers need a scale above 1, as in diffusers; raise scale, or set skip_layers to []")
        return self

    def check_layers(self, count: int, name: str = "method.guidance.skip_layers") -> None:
        """Raise ConfigError, with the name of the setting, for a block that a teacher of `count` blocks lacks."""
        for layer in self.skip_layers:
            if layer >= count:
                raise ConfigError(f"{name}: there is no block {layer}; the teacher's blocks are 0 to {count - 1}")

    def sample_scale(self, draw: Draw) -> Tensor | float:
        """Sample a scale for each image (B,), or return the one scale of all."""
        if isinstance(self.scale, tuple):
            low, high = self.scale
            return low + (high - low) * draw.uniform()
        return self.scale

    def scale_at(self, t: Tensor, scale: Tensor | float) -> Tensor | None:
        """Restrict a sampled scale to the interval: 1 at times t (B,) outside of it. None if no image is guided."""
        if self.scale == 1:
            return None
        return torch.where(_inside(self.interval, t), torch.ones_like(t) * scale, torch.ones_like(t))

    def skip_scale_at(self, t: Tensor, conditional: bool = False) -> Tensor | None:
        """The scale (B,) of the skip-layer term: 0 at times t (B,) outside of its interval. None without the term.

        With `conditional` it is also None if all times are outside, which waits for the device.
        """
        if not self.skip_layers:
            return None
        inside = _inside(self.skip_interval, t)
        if conditional and not inside.any():
            return None
        return torch.where(inside, self.skip_scale * torch.ones_like(t), torch.zeros_like(t))

    def skips_at(self, t: float) -> bool:
        """Whether there is a skip-layer term at a time that all images share."""
        return bool(self.skip_layers) and self.skip_interval[0] <= t <= self.skip_interval[1]


def _inside(interval: tuple[float, float], t: Tensor) -> Tensor:
    return (t >= interval[0]) & (t <= interval[1])


class Guidance(TeacherGuidance):
    """Guidance of methods with a fake. DMD leaves it unguided; with `guide_fake` it has the teacher's scale (SiD-DiT).

    A guided fake is guided in its own loss too: its guided velocity, not its plain one, learns the field of the
    student's images. If only the student's loss guided it, teacher and fake would agree for a student of the unguided
    teacher. The skip-layer term belongs to the teacher alone.
    """

    guide_fake: bool = False
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of null prompts in the loss of a guided fake


def velocity_uniform(x_0: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """FGM's: 1 in velocity space, which is 1 / t^2 in x_0 space."""
    return torch.ones_like(t)


def one_minus_t(x_0: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """SiD-DiT's: 1 - t in x_0 space, which is t^2 (1 - t) in velocity space."""
    return t**2 * (1 - t)


def inverse_l1(x_0: Tensor, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """SiD's and DMD's: 1 / mean |x_0 - f_u| in x_0 space, for each image alone."""
    error = (x_0 - x_0_from_velocity(x_t, u, t)).abs().flatten(1).mean(1)
    return t**2 / error.clamp(min=1e-3)


WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "velocity-uniform": velocity_uniform,
    "one-minus-t": one_minus_t,
    "inverse-l1": inverse_l1,
}


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> as a mean over all dimensions but the batch: (B, ...) to (B,)."""
    return (a * b).flatten(1).mean(1)


def generate_x0(nets: Velocities, batch: TrainingBatch) -> Tensor:
    """x_0 = z - v(z, 1), the student's images (B, C, h, w) in fp32; with gradient in the student's update phase."""
    return one_step(nets.student, batch.z, batch.cond).float()


def add_noise(times: Times, x_0: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """x_t = (1 - t) x_0 + t eps, at sampled t (B,), with fresh noise eps; returns x_t, t and eps."""
    t = times.sample(draw).to(x_0.device)
    eps = draw.normal(x_0.shape[1:]).to(x_0.device)
    return interpolate(x_0, eps, t), t, eps


def guided_velocities(
    guidance: Guidance, nets: Velocities, x_t: Tensor, t: Tensor, batch: TrainingBatch
) -> tuple[Tensor, Tensor]:
    """The teacher's and the fake's velocities u, v at x_t, guided as configured."""
    scale = guidance.scale_at(t, guidance.sample_scale(batch.draw))
    skip_scale = guidance.skip_scale_at(t, nets.conditional_calls)
    u = guided_velocity(nets.teacher, nets.null, x_t, t, batch.cond, scale, guidance.skip_layers, skip_scale)
    v = guided_velocity(nets.fake, nets.null, x_t, t, batch.cond, scale if guidance.guide_fake else None)
    return u, v


def guided_teacher(guidance: TeacherGuidance, nets: Velocities, draw: Draw) -> Velocity:
    """The guided teacher as one velocity field; an image has the same sampled scale at all times."""
    scale = guidance.sample_scale(draw)

    def u(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        scales = guidance.scale_at(t, scale), guidance.skip_layers, guidance.skip_scale_at(t, nets.conditional_calls)
        return guided_velocity(nets.teacher, nets.null, x_t, t, cond, *scales)

    return u


def guided_at(
    guidance: TeacherGuidance, teacher: Callable[..., Tensor], null: Any, scale: Tensor | float
) -> Callable[[Tensor, float, Any], Tensor]:
    """The guided teacher as a function of one time for the whole batch, to be sampled.

    Outside of its interval, the skip-layer term is not computed.
    """

    def u(x_t: Tensor, t: float, cond: Any) -> Tensor:
        times = x_t.new_full((len(x_t),), t)
        skip_scale = guidance.skip_scale if guidance.skips_at(t) else None
        scales = guidance.scale_at(times, scale), guidance.skip_layers, skip_scale
        return guided_velocity(teacher, null, x_t, times, cond, *scales)

    return u


def fake_loss(times: Times, guidance: Guidance, nets: Velocities, batch: TrainingBatch) -> Loss:
    """Flow matching on the student's images, |v - w|^2; no gradient reaches the student."""
    with torch.no_grad():
        x_0 = generate_x0(nets, batch)
    t, error = fake_error(times, guidance, nets, x_0, batch.cond, batch.draw)
    return Loss(error.mean(), {"t": t, "flow_matching": error.detach()}, x_0)


def fake_error(
    times: Times, guidance: Guidance, nets: Velocities, x_0: Tensor, cond: Any, draw: Draw, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Times t (B,) and |v - factor w|^2 (B,) on images x_0. A fake that is guided loses some of its captions."""
    x_t, t, eps = add_noise(times, x_0, draw)
    scale = None
    if guidance.guide_fake:
        dropped = (draw.uniform() < guidance.caption_dropout).to(x_0.device)
        cond = cond.where(dropped, nets.null)
        scale = guidance.scale_at(t, guidance.sample_scale(draw))
    target = factor * (eps - x_0)
    v = guided_velocity(nets.fake, nets.null, x_t, t, cond, scale)
    return t, dot(v - target, v - target)
