"""The teacher and the configuration of a run, as its folder records them. Read without PyTorch."""

import json
from collections.abc import Mapping
from pathlib import Path

from distill.config import RunConfig, load_config
from distill.errors import CheckpointError, ConfigError, SizeError
from distill.files import atomic_write_text
from distill.models.sd3_folder import SD3Folder
from distill.models.teacher import is_single_file, open_teacher, pin_teacher
from distill.report.run_folder import read_run

PINS = "teacher.json"  # the commits of models of the hub
SOURCES = "sources.json"  # digests of the teacher, prompts and real images that a run trains on
TEXTS = "online-prompts.jsonl"  # the prompts of a run that encodes them online


def pin_teachers(config: RunConfig, out: Path) -> dict[str, str]:
    """Map the teacher of the run in `out`, and its base, to references with the commit of models of the hub.

    A run keeps the commits that it began with when branches move, as long as it is given the same teacher and base.
    """
    known = _read_pins(out)
    given = (config.teacher, config.teacher_base)
    return {each: known.get(each) or pin_teacher(each) for each in given if each is not None}


def write_pins(out: Path, pins: Mapping[str, str]) -> None:
    """Write what `pin_teachers` returned, if any of it is a model of the hub."""
    pinned = {given: commit for given, commit in pins.items() if commit != given}
    if pinned:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / PINS, json.dumps(pinned, indent=2) + "\n")


def open_pinned(config: RunConfig, pins: Mapping[str, str]) -> SD3Folder:
    """Open a run's teacher at these commits, with the run's number of T5 tokens."""
    base = None if config.teacher_base is None else pins[config.teacher_base]
    return open_teacher(pins[config.teacher], base).with_sequence_length(config.prompts.max_sequence_length)


def read_teacher(config: RunConfig, out: Path) -> SD3Folder:
    """Open the teacher of the run in `out`, with the run's number of T5 tokens."""
    return open_pinned(config, pin_teachers(config, out))


def open_moved(out: Path, teacher: str, base: str | None) -> SD3Folder:
    """Open the teacher of the run in `out` at another place. A single file is completed by the run's base by default.

    Raises RunError if there is no run.
    """
    read_run(out)
    own = read_config(out).teacher_base
    if base is None and own is not None and is_single_file(teacher, None):
        base = _read_pins(out).get(own, own)
    return open_teacher(teacher, base)


def _read_pins(out: Path) -> dict[str, str]:
    """The references that `write_pins` wrote, by what the run was given."""
    path = out / PINS
    try:
        return {str(given): str(pinned) for given, pinned in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not name the commit of the teacher ({error}); give another --out") from None


def read_config(out: Path) -> RunConfig:
    """Read the configuration of a run folder. Raises CheckpointError for one of another version."""
    path = out / "config.yaml"
    try:
        return load_config(str(path))
    except ConfigError as error:
        raise CheckpointError(
            f"{path} is no configuration of this version ({error}); a run of another version is not continued: "
            "give another --out"
        ) from error


def check_teacher(out: Path, teacher: SD3Folder) -> None:
    """Raise CheckpointError if the run in `out` was trained from a teacher with another digest."""
    digests = read_digests(out)
    if digests is not None and digests["teacher"] != teacher.digest:
        pinned = " and ".join(_read_pins(out).values())
        own = f"its own teacher, {pinned}" if pinned else "the current path of its own teacher"
        named = teacher.path if teacher.revision is None else teacher.reference
        raise CheckpointError(f"{out} was trained from another teacher than {named}; give {own}, or another --out")


def read_digests(out: Path) -> dict[str, str] | None:
    """Read what a run has trained on; None if nothing was recorded. Raises CheckpointError for a damaged record."""
    path = out / SOURCES
    if not path.exists():
        return None
    try:
        digests: dict[str, str] = json.loads(path.read_text())
        digests["teacher"]  # every record has it
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} does not hold the digests of the run's sources ({error}); give another --out"
        ) from None
    return digests


def latent_shapes(config: RunConfig, teacher: SD3Folder) -> list[tuple[int, int, int]]:
    """(C, h, w) of each size that the run draws from. Raises SizeError for one that the teacher cannot make."""
    try:
        return [teacher.latent_shape_of(*size) for size in config.sizes] or [teacher.latent_shape]
    except SizeError as error:
        raise SizeError(f"sizes: {error}") from None
