"""Distillation methods, one file each; the file's name is the name that a configuration gives.

A method is stateless: its typed configuration has `update_phases()`, which say which network learns, for how many
steps, from which loss. It never sees an optimizer, a device, an accelerator or a step number. A loss sees networks as
functions `velocity(x_t, t, cond) -> v`, so a closed form and a model of 8 B parameters are the same to it.
"""

import ast
import importlib
import pkgutil
from pathlib import Path
from typing import Any

_SHARED = {"base", "policies"}


def names() -> list[str]:
    """List the methods."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} - _SHARED)


def summary(name: str) -> str:
    """Return the first line of a method's docstring. It imports no torch."""
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].rstrip(".")


def config_class(name: str) -> Any:
    """Find a method's configuration class: the one that its file defines with a name that ends in `Config`."""
    module = importlib.import_module(f"{__name__}.{name}")
    found = (each for key, each in vars(module).items() if key.endswith("Config"))
    return next(each for each in found if each.__module__ == module.__name__)
