"""PyTorch, imported at its first use.

A configuration names a method, and the class of its settings holds its losses. Checking a configuration needs no
PyTorch, whose import takes seconds; modules with settings therefore take `torch` from here.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("torch"), name)

    torch = _Torch()
