"""Resumable state of the world's own trainings: modules and optimizers in safetensors, numbers in JSON.

A state is written beside its place and renamed, so that what lies there is always whole.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.errors import CheckpointError


def save_state(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    images: int,
    recipe: Any,
) -> None:
    """Write everything that a run needs to go on after `images` images."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module.{name}.{key}": value for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{index}.{key}": value for key, value in entries.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, aside / "state.safetensors")
    (aside / "state.json").write_text(json.dumps({"images": images, "recipe": asdict(recipe)}, indent=2))
    for path in aside.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], recipe: Any) -> int:
    """Restore what `save_state` wrote and return the images seen; 0 when there is nothing to restore.

    Raises CheckpointError when the state was made by a recipe that differs in more than its budget.
    """
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # killed between the two renames
        old.rename(folder)
    if not folder.exists():
        return 0
    record = json.loads((folder / "state.json").read_text())
    for key, value in asdict(recipe).items():
        if key != "images" and record["recipe"].get(key) != value:
            raise CheckpointError(
                f"{folder} was trained with {key} = {record['recipe'].get(key)}, not {value}; "
                "give the same value or another --out folder"
            )
    tensors = load_file(folder / "state.safetensors")
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimizer.{name}."
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, entry = key.removeprefix(prefix).split(".", 1)
                state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(record["images"])
