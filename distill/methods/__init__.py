"""Distillation objectives, one file each; the file's name is the name that a configuration gives.

A method is stateless: a typed configuration whose `turns()` say which network learns, how often, from which loss. It
never sees an optimizer, a device, an accelerator or a step number. A loss sees the networks as functions
`velocity(x_t, t, cond) -> v` and the student's images `x_0`, so a closed form and a model of 8 B are the same to it.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distill.flow import Draw

Velocity = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Velocities:
    """The fields that a loss may ask, and the condition of the empty prompt, one row."""

    teacher: Velocity
    fake: Velocity
    null: Any


@dataclass(frozen=True)
class Loss:
    """A scalar to descend, and figures per image (B,) to log: `t` and squared distances."""

    value: Tensor
    figures: dict[str, Tensor]


@dataclass(frozen=True)
class Turn:
    """`role` ("fake" or "student") learns for `steps` steps from `loss(velocities, x_0, cond, draw)`.

    `x_0` comes from the student; it carries gradient exactly in the student's own turns.
    """

    role: str
    steps: int
    loss: Callable[[Velocities, Tensor, Any, Draw], Loss]


def names() -> list[str]:
    """Every method there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def config_class(name: str) -> Any:
    """The `Config` of a method by its name."""
    return importlib.import_module(f"{__name__}.{name}").Config
