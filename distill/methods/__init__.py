"""Distillation objectives, one file each; the file's name is the name that a configuration gives.

A method is stateless: a typed configuration whose `turns()` say which network learns, how often, from which loss. It
never sees an optimizer, a device, an accelerator or a step number. A loss sees the networks as functions
`velocity(x_t, t, cond) -> v`, so a closed form and a model of 8 B are the same to it.
"""

import importlib
import pkgutil
from typing import Any

_SHARED = {"base", "policies"}


def names() -> list[str]:
    """Every method there is."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} - _SHARED)


def config_class(name: str) -> Any:
    """The `Config` of a method by its name."""
    return importlib.import_module(f"{__name__}.{name}").Config
