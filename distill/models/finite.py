"""Numbers that are not finite: they are neither written nor loaded as weights."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from distill.errors import TeacherError


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a number that is not finite; None when all are."""
    sound = {name: tensor.isfinite().all() for name, tensor in tensors.items()}
    return next((name for name, each in sound.items() if not each), None)


def check_finite(model: nn.Module, path: Path) -> None:
    """Raise TeacherError, naming where a model was loaded from, unless all of its weights are finite."""
    if (name := not_finite(model.state_dict())) is not None:
        dtype = model.state_dict()[name].dtype
        raise TeacherError(
            f"{path}: {name} is not finite in {dtype}; if the folder is damaged, fetch or export it again, else load "
            "it in bf16 or fp32"
        )
