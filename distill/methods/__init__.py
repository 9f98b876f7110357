"""Distillation objectives, one file each; the file's name is the name that a configuration gives.

A method is stateless: a typed configuration whose `turns()` say which network learns, how often, from which loss. It
never sees an optimizer, a device, an accelerator or a step number. A loss sees the networks as functions
`velocity(x_t, t, cond) -> v`, so a closed form and a model of 8 B are the same to it.

Times are (B,). A student of two times also takes (B, 2), t and s, and gives its mean velocity from t to s; asked with
t alone it means the way to data, s = 0.
"""

import importlib
import pkgutil
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
    """A scalar to descend, and what to log: figures per image (B,), `t` and squared distances, and images made."""

    value: Tensor
    figures: dict[str, Tensor]
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


def names() -> list[str]:
    """Every method there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def config_class(name: str) -> Any:
    """The `Config` of a method by its name."""
    return importlib.import_module(f"{__name__}.{name}").Config
