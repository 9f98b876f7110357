"""Types that distillation methods share: velocities, batches, losses, update phases, and what these train.

Times t are (B,). A student of two times also takes (B, 2), t and s, and returns its mean velocity from t to s. With one
time, s is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from distill.philox import Draw

if TYPE_CHECKING:
    from torch import Tensor

Velocity = Callable[["Tensor", "Tensor", Any], "Tensor"]  # x_t (B, C, h, w), t (B,), conditions -> (B, C, h, w)
Critic = Callable[["Tensor", "Tensor", Any], "Tensor"]  # the same -> logits (B,)
ROLES = ("fake", "student")  # that can be trained


class NetworkVelocity(Protocol):
    """The velocity of a network, which can leave out transformer blocks: those whose indices are in `skip_layers`."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any, skip_layers: Sequence[int] = (), /) -> Tensor: ...


def _no_critic(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    raise TypeError("an update phase whose loss calls the critic must declare it: UpdatePhase(..., critic=True)")


@dataclass(frozen=True)
class Velocities:
    """The networks as a loss sees them; `null` is the condition of the empty prompt, one row.

    `shift` is the time shift of the teacher's scheduler, for losses that sample the teacher. `critic` returns logits
    that noised images are real. It is a head on the fake and learns with it. Gradient reaches the weights of the role
    that learns, and the inputs of the others. With `conditional_calls`, a loss may leave out a call of a network that
    no image of its batch needs.
    """

    student: Velocity
    teacher: NetworkVelocity
    fake: NetworkVelocity
    null: Any
    critic: Critic = _no_critic
    shift: float = 1.0
    conditional_calls: bool = False


@dataclass(frozen=True)
class Real:
    """Real images x_0 (B, C, h, w) in fp32, as scaled latents, and the conditions of their captions."""

    x_0: Tensor
    cond: Any


@dataclass(frozen=True)
class TrainingBatch:
    """Input of a loss: noise `z` (B, C, h, w) in fp32, conditions of the prompts, and the random numbers `draw`.

    An update phase that declares `real` also gets as many real images.
    """

    z: Tensor
    cond: Any
    draw: Draw
    real: Real | None = None


@dataclass(frozen=True)
class Loss:
    """A scalar to minimize, metrics (B,) to log, among them `t`, and the generated images (B, C, h, w)."""

    value: Tensor
    metrics: dict[str, Tensor]
    x_0: Tensor


@dataclass(frozen=True)
class UpdatePhase:
    """A part of a round: `role` ("fake" or "student") takes `steps` optimizer steps on `loss(velocities, batch)`.

    The flags declare what the loss needs: `two_times`, a student that takes two times; `real`, real images in the
    batch; `critic`, the critic; `forward_mode`, forward-mode derivatives of a network.
    """

    role: str
    steps: int
    loss: Callable[[Velocities, TrainingBatch], Loss]
    two_times: bool = False
    real: bool = False
    critic: bool = False
    forward_mode: bool = False


@dataclass(frozen=True)
class TrainedNetworks:
    """What a method trains: the networks of `roles`.

    With `two_times` the student takes a second time; with a `critic` the fake has its head.
    """

    roles: tuple[str, ...] = ROLES
    two_times: bool = False
    critic: bool = False

    @classmethod
    def of(cls, phases: Sequence[UpdatePhase]) -> Self:
        """What the update phases of a method train."""
        roles = tuple(sorted({phase.role for phase in phases}))
        return cls(roles, any(phase.two_times for phase in phases), any(phase.critic for phase in phases))
