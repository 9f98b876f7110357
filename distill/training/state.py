"""Progress of any training, and the states that trainings of small teachers resume from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distill.config_group import ConfigGroup
from distill.errors import CheckpointError, OutputError
from distill.models.sd3_files import COMPONENTS, RECORD
from distill.training import checkpoint

# Budget and cadences of a recipe, and how much is evaluated
FREE = ("images", "per_task", "evaluation_images", "log_every", "evaluate_every", "checkpoint_every")


@dataclass(frozen=True)
class TrainingProgress:
    """Images seen before and after a step, their budget, and metrics; `save()` writes a state at once.

    `notes` are messages for the user, such as alarms.
    """

    before: int
    images: int
    total: int
    metrics: dict[str, float]
    save: Callable[[], None]
    notes: list[str] = field(default_factory=list, kw_only=True)

    def crosses(self, every: int) -> bool:
        """Whether a multiple of `every` images was reached in this step."""
        return checkpoint.crosses(self.before, self.images, every)


def save_state(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer, images: int, recipe: ConfigGroup
) -> None:
    """Write all that training needs to continue, in place of older states. Raises CheckpointError if writing fails."""
    tensors = checkpoint.pack("optimizer", checkpoint.optimizer_tensors(optimizer))
    for name, module in modules.items():
        tensors |= checkpoint.pack(name, module.state_dict())
    saved = folder / checkpoint.state_name(images)
    checkpoint.save(saved, tensors, {"images": images, "recipe": recipe.model_dump()})
    checkpoint.prune(saved, 1)


def check_folder(folder: Path, states: Iterable[str], written: Iterable[str]) -> None:
    """Raise OutputError if a pipeline's files, or `written` ones, are there without one of its `states`."""
    if any(checkpoint.states(folder / name) for name in states):
        return
    for name in (*COMPONENTS, "model_index.json", RECORD, *written):
        if (folder / name).exists():
            raise OutputError(f"{folder} holds {name}, but no state of this training; give another --out")


def check_state(folder: Path, recipe: ConfigGroup) -> None:
    """Raise CheckpointError when the newest state, if any, was made by a recipe that differs in more than FREE."""
    newest = checkpoint.latest(folder)
    if newest is not None:
        _check_recipe(newest, checkpoint.load_record(newest)["recipe"], recipe)


def _check_recipe(newest: Path, made_with: Mapping[str, Any], recipe: ConfigGroup) -> None:
    for key, value in recipe.model_dump(mode="json").items():
        if key not in FREE and made_with.get(key) != value:
            raise CheckpointError(
                f"{newest} was trained with {key} = {made_with.get(key)}, not {value}; "
                "give the same value or another --out folder"
            )


def load_state(folder: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer, recipe: ConfigGroup) -> int:
    """Restore what `save_state` wrote and return the images seen, or 0. Raises CheckpointError for another recipe."""
    newest = checkpoint.latest(folder)
    if newest is None:
        return 0
    tensors, record = checkpoint.load(newest)
    _check_recipe(newest, record["recipe"], recipe)
    for name, module in modules.items():
        module.load_state_dict(checkpoint.unpack(name, tensors))
    checkpoint.restore_optimizer(optimizer, checkpoint.unpack("optimizer", tensors))
    return int(record["images"])
