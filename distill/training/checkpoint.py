"""States of a run on disk: tensors in safetensors, numbers and a checksum in JSON, written completely or not at all.

A state is a folder, written by `files.atomic_write`, so a folder with a final name is complete.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from distill.errors import CheckpointError, DivergedError
from distill.files import atomic_write, atomic_write_text, reason, sha256
from distill.models.tensor_file import write_tensors
from distill.models.weights import first_nonfinite, tensor_shapes
from distill.report.run_folder import images_of
from distill.training.state_folders import state_name as state_name
from distill.training.state_folders import states as states

_TENSORS, _RECORD = "state.safetensors", "state.json"
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def save(folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a state to `folder`, in place of an older one. It needs memory for a copy of one tensor at a time.

    Raises DivergedError for numbers that are not finite, and CheckpointError if writing fails or `folder` contains
    other files. No partly written state has a final name.
    """
    if (name := first_nonfinite(tensors)) is not None:
        raise DivergedError(
            f"{name} is not finite after {record['images']} images, so no checkpoint is written; lower the learning "
            "rates, or train with precision fp32; the checkpoint before it is sound"
        )
    for path in folder.glob("*"):
        if path.name not in (_TENSORS, _RECORD):
            raise CheckpointError(f"{path} is in the place of a checkpoint and not a part of one; move it away")
    try:
        with atomic_write(folder) as made:
            made.mkdir()
            checked = {**record, "sha256": write_tensors(made / _TENSORS, tensors)}
            (made / _RECORD).write_text(json.dumps(checked, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not save {folder}: {reason(error)}; make room and run the same command, "
            "it continues from the checkpoint before"
        ) from error


def load(folder: Path, part: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the tensors, or those of one packed `part`, and the record. Raises CheckpointError for a damaged state."""
    start = f"{part}/" if part else ""
    try:
        _check(folder)
        with safe_open(folder / _TENSORS, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118, it is no mapping
            tensors = {name.removeprefix(start): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise _unreadable(folder, error) from error
    if (name := first_nonfinite(tensors)) is not None:
        raise _unreadable(folder, f"{start}{name} is not finite")
    return tensors, load_record(folder)


def shapes(folder: Path, part: str) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors of a packed part by name. Raises CheckpointError for an unreadable state."""
    try:
        return unpack(part, tensor_shapes(folder / _TENSORS))
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error


def load_record(folder: Path) -> dict[str, Any]:
    """Read the record of a state without its tensors. Raises CheckpointError for an unreadable one."""
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(folder, error) from error
    return record


def _check(folder: Path) -> None:
    """Raise OSError, SafetensorError or ValueError unless the tensors are those that were written with the record."""
    record = json.loads((folder / _RECORD).read_text())
    if not isinstance(record, dict):
        raise ValueError(f"{_RECORD} does not hold a JSON object")
    with safe_open(folder / _TENSORS, framework="pt"):  # checks the header against the file's length
        status = (folder / _TENSORS).stat()
    written = record.get("sha256")  # states of earlier versions have none
    if written not in (None, _checksum(folder / _TENSORS, status.st_mtime_ns, status.st_size, status.st_ino)):
        raise ValueError(f"the checksum of {_TENSORS} is not that in {_RECORD}")


@lru_cache(64)
def _checksum(path: Path, *changes: int) -> str:
    """A file's checksum. It is cached while the file's status is unchanged, because states are gigabytes."""
    return sha256(path)


def _unreadable(folder: Path, error: object) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be read ({error}); remove it to go on from the one before")


def latest(folder: Path) -> Path | None:
    """Find the newest readable state in a folder; damaged ones are skipped with a warning. None without one."""
    for path in reversed(states(folder)):
        try:
            _check(path)
            return path
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            _log.warning("%s cannot be read (%s); an older one is taken if there is one", path, error)
    return None


def images_in(folder: Path) -> int:
    """The images of the newest readable state in a folder; 0 without one."""
    newest = latest(folder)
    return 0 if newest is None else int(newest.name)


def prune(saved: Path, keep: int) -> None:
    """Remove the states before `saved` in its folder, except the last `keep` - 1.

    Later ones stay and do not count: a run that was resumed before them could not read them.
    """
    before = [path for path in states(saved.parent) if path.name < saved.name]
    _remove(before[: max(0, len(before) - (keep - 1))])


def keep_only(saved: Path) -> None:
    """Remove all other states in the folder of `saved`, earlier and later ones."""
    _remove(path for path in states(saved.parent) if path.name != saved.name)


def _remove(folders: Iterable[Path]) -> None:
    """Remove states. Other files in their folders stay."""
    for path in folders:
        for name in (_RECORD, _TENSORS):
            (path / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            path.rmdir()


def crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` images was reached between two numbers of images seen."""
    return after // every > before // every


def trim_lines(path: Path, images: int) -> None:
    """Remove incomplete lines of a JSONL log, and lines after `images`, which will be written again."""
    if path.exists():
        lines = [line for line in path.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]
        ends = zip(lines, map(images_of, lines), strict=True)
        atomic_write_text(path, "".join(line for line, end in ends if end is not None and end <= images))


def pack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prefix the names of tensors with `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def unpack(prefix: str, tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Select the entries of `prefix/` and remove the prefix."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, by the index of the parameter and the entry's name."""
    state = Optimizer.state_dict(optimizer)["state"]  # bitsandbytes' own method nests it
    return {
        f"{index}/{name}": torch.as_tensor(value) for index, entries in state.items() for name, value in entries.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state of `optimizer_tensors`. Integers, as bitsandbytes' step counts, become Python numbers again."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        whole = value.ndim == 0 and value.dtype == torch.int64
        state.setdefault(int(index), {})[name] = int(value) if whole else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
