"""Resumable state of the world's own trainings: modules, optimizers and images seen, as checkpoints of a recipe."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distill import checkpoint
from distill.errors import CheckpointError


def save_state(folder: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer, images: int, recipe: Any) -> None:
    """Write everything that a training needs to go on after `images` images; the newest state alone is kept.

    Raises CheckpointError when the disk refuses.
    """
    tensors = checkpoint.pack("optimizer", checkpoint.optimizer_tensors(optimizer))
    for name, module in modules.items():
        tensors |= checkpoint.pack(name, module.state_dict())
    checkpoint.save(folder / checkpoint.state_name(images), tensors, {"images": images, "recipe": asdict(recipe)})
    checkpoint.prune(folder, 1)


def load_state(folder: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer, recipe: Any) -> int:
    """Restore what `save_state` wrote and return the images seen; 0 when there is nothing to restore.

    Raises CheckpointError when the state was made by a recipe that differs in more than its budget.
    """
    newest = checkpoint.latest(folder)
    if newest is None:
        return 0
    tensors, record = checkpoint.load(newest)
    for key, value in asdict(recipe).items():
        if key != "images" and record["recipe"].get(key) != value:
            raise CheckpointError(
                f"{newest} was trained with {key} = {record['recipe'].get(key)}, not {value}; "
                "give the same value or another --out folder"
            )
    for name, module in modules.items():
        module.load_state_dict(checkpoint.unpack(name, tensors))
    checkpoint.restore_optimizer(optimizer, checkpoint.unpack("optimizer", tensors))
    return int(record["images"])
