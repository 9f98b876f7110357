"""States of a run on disk: tensors in safetensors, numbers in JSON, whole or not at all.

A state is a folder, written beside its place, flushed, and renamed into it. What bears a final name is complete.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from distill.errors import CheckpointError

_TENSORS, _RECORD = "state.safetensors", "state.json"


def save(folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a state to `folder`, which must not exist.

    Raises CheckpointError when the disk refuses; nothing half-written keeps a final name.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside / _TENSORS)
        (aside / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
        for path in (aside / _TENSORS, aside / _RECORD, aside):
            flush(path)
        aside.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"could not save {folder}: {error}; make room and run the same command, "
            "it continues from the checkpoint before"
        ) from error


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a state. Raises CheckpointError when it cannot be read."""
    try:
        return load_file(folder / _TENSORS), json.loads((folder / _RECORD).read_text())
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); remove it to go on from the one before") from error


def latest(folder: Path) -> Path | None:
    """The newest state in a folder of states named by images seen; None when there is none."""
    states = sorted(path for path in folder.glob("[0-9]*") if path.is_dir())
    return states[-1] if states else None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` states."""
    for path in sorted(path for path in folder.glob("[0-9]*") if path.is_dir())[:-keep]:
        shutil.rmtree(path)


def state_name(images: int) -> str:
    """The folder's name of a state; names sort by images."""
    return f"{images:012d}"


def flush(path: Path) -> None:
    """Make a file or folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_aside(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    flush(aside)
    aside.replace(path)


def trim_lines(path: Path, images: int) -> None:
    """Drop the lines of a JSONL log, if it is there, after the state of `images`; they will be written again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["images"] <= images]
        write_aside(path, "".join(line + "\n" for line in lines))


def pack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def unpack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` put under `prefix/`."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, by the index of the parameter and the entry's name."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": value for index, entries in state.items() for name, value in entries.items()}


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
