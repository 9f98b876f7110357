"""Check that a component's weights match its configuration, by names and shapes alone."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from distill.errors import TeacherError
from distill.models.sd3_folder import find_weights
from distill.training.checkpoint import shapes_in


def check_fit(kind: Any, path: Path) -> None:
    """Raise TeacherError unless a diffusers folder holds all weights of its model in their shapes, and no others.

    The loaders of diffusers leave missing weights uninitialized and ignore superfluous ones.
    """
    try:
        with torch.device("meta"):
            model = kind.from_config(kind.load_config(path, local_files_only=True))
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise TeacherError(
            f"{path / 'config.json'} is not usable ({error}); fetch or export the folder again"
        ) from None
    given: dict[str, tuple[int, ...]] = {}
    try:
        for file in find_weights(path).files:
            given |= shapes_in(file)
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"the weights in {path} cannot be read ({error}); fetch or export them again") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    if unknown := sorted(given.keys() - model.state_dict().keys()):
        raise _differs(path, f"hold {unknown[0]}, which the configuration has no place for")
    for name, shape in wanted.items():
        if name not in given:
            raise _differs(path, f"lack {name}, which the configuration calls for")
        if given[name] != shape:
            raise _differs(path, f"hold {name} as {given[name]}, and the configuration calls for {shape}")


def check_loaded(told: dict[str, Any], path: Path) -> None:
    """Raise TeacherError if the loading info of transformers reports weights that were missing or of another shape."""
    if made_up := sorted(told["missing_keys"]) + sorted(str(name) for name, *_ in told["mismatched_keys"]):
        raise _differs(path, f"lack {made_up[0]} in the shape that the configuration calls for")


def _differs(path: Path, how: str) -> TeacherError:
    return TeacherError(f"the weights in {path} {how}; fetch or export the folder again")
