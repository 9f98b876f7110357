"""`tuned_choice`: how a student is computed fastest on a device, where its runtime options say `auto`.

choice = tuned_choice(folder, device, RuntimeOptions(), Path("choices"), seconds=60)
pipeline = OneStepPipeline.load(folder, device, choice)

A choice is kept in a folder for each device, architecture, set of options and version of the libraries, so that it is
measured once: the last bits of images depend on it. Students of one architecture share it, whatever their weights.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from distill.errors import OutputError
from distill.files import atomic_write_text
from distill.options import RuntimeOptions
from distill.student.runtime import RuntimeChoice
from distill.student.spec import read_student
from distill.student.tuner import Tuner

log = logging.getLogger(__name__)

FORMAT = 2
# Settings that say how files were written, and not what is computed: the options choose the precision.
_OF_FILES = ("_name_or_path", "_diffusers_version", "transformers_version", "dtype", "torch_dtype")


class _Kept(BaseModel):
    """A choice on disk, with what it was made for and the milliseconds that decided."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    made_for: dict[str, Any]
    choice: RuntimeChoice
    milliseconds: dict[str, float]
    complete: bool = True  # false if the time ended before everything was measured


def tuned_choice(
    student: Path, device: torch.device, options: RuntimeOptions, folder: Path, seconds: float, max_batch: int = 16
) -> RuntimeChoice:
    """Return the kept choice for a student, or measure for about so many seconds and keep the choice in `folder`.

    Processes that ask at the same time wait for the first one, so they get the same choice. No batch is larger than
    `max_batch`, unless the options say so. A kept choice is used even if its search was cut short: another one would
    change the last bits of images. Raises what `OneStepPipeline.load` raises, and OutputError if the folder cannot be
    read or written.
    """
    made_for = _made_for(student, device, options, max_batch)
    name = read_student(student).name
    digest = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()
    path = folder / f"choice-{digest[:16]}.json"
    kept = _read(path, made_for)  # without the lock, which a read-only folder cannot have
    if kept is None:
        lock = FileLock(path.with_suffix(".lock"))
        with _keeping_in(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            kept = _read(path, made_for)
            if kept is None:
                log.info("measuring for at most about %g s how %s computes %s fastest", seconds, device, name)
                tuner = Tuner(student, device, options, max_batch, seconds)
                choice = tuner.choose()
                log.info("measured for %.1f s", tuner.seconds_taken())
                kept = _Kept(
                    format=FORMAT,
                    made_for=made_for,
                    choice=choice,
                    milliseconds=tuner.milliseconds,
                    complete=tuner.time_left() > 0,
                )
                with _keeping_in(folder):
                    atomic_write_text(path, kept.model_dump_json(indent=1))
        finally:
            lock.release()
    log.info("%s computes %s with %s; kept in %s", device, name, kept.choice.description, path)
    if not kept.complete:
        log.warning("the search of %s was cut short; delete the file to measure again, which may change images", path)
    return kept.choice


@contextmanager
def _keeping_in(folder: Path) -> Iterator[None]:
    """Raise errors of the file system as OutputError, which names the folder of choices."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the measured choice cannot be kept in {folder}: {error.strerror}; make room and let this user write "
            "there, or set tuning_seconds to 0"
        ) from error


def device_name(device: torch.device) -> str:
    """Name what times and last bits depend on: the GPU, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )


def _made_for(student: Path, device: torch.device, options: RuntimeOptions, max_batch: int) -> dict[str, Any]:
    """Return all that a choice depends on."""
    spec = read_student(student)
    architecture = {}
    for path in sorted(student.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in _OF_FILES}
        architecture[path.parent.name] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "options": options.model_dump(mode="json"),
        "decoder": spec.decoder if options.decoder == "auto" else str(options.decoder),
        "max_batch": max_batch,
        "architecture": architecture,
        "sizes": [list(size) for size in spec.sizes],
        "sequence_length": spec.max_sequence_length,
        "any_step": spec.any_step,
    }


def _read(path: Path, made_for: Mapping[str, Any]) -> _Kept | None:
    """Read a kept choice; None if there is none, or none that this version can use."""
    with _keeping_in(path.parent):
        if not path.exists():
            return None
        data = path.read_bytes()
    try:
        kept = _Kept.model_validate_json(data)
    except ValidationError as error:
        log.warning("%s is no choice of this version and is measured again: %s", path, error)
        return None
    sizes = [list(each.size) for each in kept.choice.sizes]
    return kept if (kept.format, kept.made_for, sizes) == (FORMAT, made_for, made_for["sizes"]) else None
