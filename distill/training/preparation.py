"""What a run checks and writes before it computes anything."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import yaml

from distill.config import RunConfig, load_config
from distill.errors import CheckpointError, ConfigError, OutputError, RunError, SizeError
from distill.files import atomic_write_text
from distill.models.sd3 import check_parts
from distill.models.sd3_folder import SD3Folder
from distill.models.teacher import is_single_file, open_teacher, pin_teacher
from distill.report.run_folder import ALARMS, EVALUATED, EVALUATIONS, METRICS, read_run
from distill.report.run_state import STATE, read_state, write_state
from distill.student.export import check_place
from distill.training import checkpoint
from distill.training.initial_weights import check_initial_weights
from distill.training.run_evaluator import check_evaluator
from distill.training.run_sources import SOURCES, TEXTS, read_digests, run_sources

PINS = "teacher.json"  # the commits of models of the hub
SPEED = "speed.json"  # what `distill.training.speed` measured
_FOLDERS = ("checkpoints", "best", "student", "samples", EVALUATED)
_RUN_FILES = (*_FOLDERS, PINS, SOURCES, TEXTS, METRICS, EVALUATIONS, ALARMS, STATE)
_log = logging.getLogger(__name__)


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


def read_speed(path: Path) -> float:
    """Read images/s that were measured before. Raises RunError for a file that holds no speed."""
    try:
        speed = float(json.loads(path.read_text())["images_per_second"])
    except (ValueError, KeyError, TypeError, RecursionError):
        speed = 0
    if not 0 < speed < math.inf:
        raise RunError(f"{path} holds no speed; remove it, and the run is measured again")
    return speed


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


def prepare(config: RunConfig, out: Path, pins: Mapping[str, str]) -> None:
    """Write the resolved configuration of a checked run, and the commits of models of the hub."""
    path = out / "config.yaml"
    if path.exists():
        before = read_config(out)
        if (before.teacher, before.identity()) != (config.teacher, config.identity()):
            (out / SPEED).unlink(missing_ok=True)  # it was measured with the other configuration
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, yaml.safe_dump(config.as_dict(), sort_keys=False))
    write_pins(out, pins)
    if read_state(out) is None:
        write_state(out, "prepared", 0, config.images)


def check_run(config: RunConfig, out: Path, teacher: SD3Folder) -> None:
    """Check the teacher's weights, initial weights, sources and the run folder; nothing is written.

    Raises TeacherError, SizeError, ConfigError for `method.guidance.skip_layers` that the teacher lacks, what
    `check_evaluator` raises, CheckpointError if `out` holds a run of another configuration, and OutputError if a run
    would replace files there that belong to no run.
    """
    latent_shapes(config, teacher)
    config.method.guidance.check_layers(teacher.layers)
    check_evaluator(config, teacher)
    _warn_of_patience(config)
    path = out / "config.yaml"
    resumed = has_checkpoint(out)
    if path.exists():
        before = read_config(out)
        if resumed:
            config.check_same(before.identity(), path)
            check_teacher(out, teacher)
    else:
        for name in _RUN_FILES:
            if (out / name).exists():
                raise OutputError(f"{out} holds {name}, but no config.yaml of a run; give another --out")
    check_place(out / "student", teacher.path)
    if not resumed:
        check_parts(teacher)
        check_initial_weights(config, teacher)
        for source in run_sources(config, out):
            if source is not None:
                source.check(teacher)


def check_teacher(out: Path, teacher: SD3Folder) -> None:
    """Raise CheckpointError if the run in `out` was trained from a teacher with another digest."""
    digests = read_digests(out)
    if digests is not None and digests["teacher"] != teacher.digest:
        pinned = " and ".join(_read_pins(out).values())
        own = f"its own teacher, {pinned}" if pinned else "the current path of its own teacher"
        named = teacher.path if teacher.revision is None else teacher.reference
        raise CheckpointError(f"{out} was trained from another teacher than {named}; give {own}, or another --out")


def has_checkpoint(out: Path) -> bool:
    """Whether a run has a checkpoint or a student, so that its configuration may no longer change."""
    return (out / "student").exists() or any(checkpoint.states(out / part) for part in ("checkpoints", "best"))


def latent_shapes(config: RunConfig, teacher: SD3Folder) -> list[tuple[int, int, int]]:
    """(C, h, w) of each size that the run draws from. Raises SizeError for one that the teacher cannot make."""
    try:
        return [teacher.latent_shape_of(*size) for size in config.sizes] or [teacher.latent_shape]
    except SizeError as error:
        raise SizeError(f"sizes: {error}") from None


def _warn_of_patience(config: RunConfig) -> None:
    patience, evaluations = config.early_stopping_patience, config.images // config.cadence.evaluate
    if patience is not None and evaluations <= patience:
        _log.warning(
            "early_stopping_patience %d cannot end this run: images and cadence.evaluate make %d evaluations",
            patience,
            evaluations,
        )
