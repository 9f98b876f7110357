"""Checks of a model's weights: names and shapes against the model's configuration, and finite numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.errors import TeacherError
from distill.models.sd3_files import find_weights


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a safetensors file by tensor. Raises OSError or SafetensorError."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, it is no mapping


def check_shapes(kind: Any, path: Path) -> None:
    """Raise TeacherError unless a diffusers folder holds all weights of its model in their shapes, and no others.

    The loaders of diffusers leave missing weights uninitialized and ignore superfluous ones.
    """
    try:
        with torch.device("meta"):
            model = kind.from_config(kind.load_config(path, local_files_only=True))
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise TeacherError(f"{path / 'config.json'} is not usable ({error}); fetch or export it again") from None
    given: dict[str, tuple[int, ...]] = {}
    try:
        for file in find_weights(path).files:
            given |= tensor_shapes(file)
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"the weights in {path} cannot be read ({error}); fetch or export them again") from None
    if unknown := sorted(given.keys() - model.state_dict().keys()):
        raise _mismatch(path, f"hold {unknown[0]}, which the configuration does not have")
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name not in given:
            raise _mismatch(path, f"lack {name}, which the configuration requires")
        if given[name] != shape:
            raise _mismatch(path, f"hold {name} as {given[name]}, and the configuration requires {shape}")


def first_missing(info: Mapping[str, Any]) -> str | None:
    """Name the first weight that the loading info of transformers reports as missing or of another shape."""
    bad = sorted(info["missing_keys"]) + sorted(str(name) for name, *_ in info["mismatched_keys"])
    return bad[0] if bad else None


def check_loading_info(info: Mapping[str, Any], path: Path) -> None:
    """Raise TeacherError if the loading info of transformers reports weights that are missing or of another shape."""
    if (name := first_missing(info)) is not None:
        raise _mismatch(path, f"lack {name} in the shape that the configuration requires")


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that holds an infinite number or NaN; None if there is none."""
    finite = {name: tensor.isfinite().all() for name, tensor in tensors.items()}
    return next((name for name, each in finite.items() if not each), None)


def check_finite(model: nn.Module, path: Path) -> None:
    """Raise TeacherError unless all weights of a model are finite; `path` is where they were loaded from."""
    if (name := first_nonfinite(model.state_dict())) is not None:
        dtype = model.state_dict()[name].dtype
        raise TeacherError(
            f"{path}: {name} is not finite in {dtype}; if the folder is damaged, fetch or export it again, else load "
            "it in bf16 or fp32"
        )


def _mismatch(path: Path, how: str) -> TeacherError:
    return TeacherError(f"the weights in {path} {how}; fetch or export the folder again")
