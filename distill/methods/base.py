"""The types that distillation methods share: fields, batches, losses and turns.

Times are (B,). A student of two times also takes (B, 2), t and s, and gives its mean velocity from t to s; asked with
t alone it means the way to data, s = 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distill.philox import Draw

Velocity = Callable[[Tensor, Tensor, Any], Tensor]
Critic = Callable[[Tensor, Tensor, Any], Tensor]


def _no_critic(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    raise TypeError("a turn whose loss asks the critic must say so: Turn(..., critic=True)")


@dataclass(frozen=True)
class Velocities:
    """The fields that a loss may ask, and the condition of the empty prompt, one row.

    `critic(x_t, t, cond)` are logits (B,) that noised images are real, of a head on the fake, which it learns with.
    Gradient reaches the weights of the role that learns, and the inputs of the others.
    """

    student: Velocity
    teacher: Velocity
    fake: Velocity
    null: Any
    critic: Critic = _no_critic


@dataclass(frozen=True)
class Real:
    """Real images x_0 (B, C, h, w) in fp32, as the networks see them, and the conditions of their captions."""

    x_0: Tensor
    cond: Any


@dataclass(frozen=True)
class Batch:
    """What a loss is computed on: noise `z` (B, C, h, w) in fp32, its prompts, and where more numbers are drawn.

    `real` images, as many, come with a turn that asks for them.
    """

    z: Tensor
    cond: Any
    draw: Draw
    real: Real | None = None


@dataclass(frozen=True)
class Loss:
    """A scalar to descend, and what to log: metrics per image (B,), `t` and squared distances, and images made."""

    value: Tensor
    metrics: dict[str, Tensor]
    x_0: Tensor


@dataclass(frozen=True)
class Turn:
    """`role` ("fake" or "student") learns for `steps` steps from `loss(velocities, batch)`.

    `two_times` says that the loss asks the student with two, `critic` that it asks the critic, `real` that it takes
    real images in its batch, and `forward_mode` that it takes derivatives with the pass of a network.
    """

    role: str
    steps: int
    loss: Callable[[Velocities, Batch], Loss]
    two_times: bool = False
    real: bool = False
    critic: bool = False
    forward_mode: bool = False
