"""Run folders on disk, read without torch, for `distill runs` and `distill report`.

The configuration is taken as it stands, not validated, so that runs of older versions stay readable.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from distill.errors import RunError
from distill.models.sd3_files import DECODER, DECODER_CONFIG, RECORD
from distill.report.alarms import Alarm, Metrics
from distill.report.run_state import read_state
from distill.training.run_lock import is_locked
from distill.training.state_folders import states

State = Literal["running", "finished", "stopped", "never started"]
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
EVALUATED = "evaluations"  # folder of pictures, named by images
TEACHER_METRICS = f"{EVALUATED}/teacher.json"  # those that evaluations compare with
ALARMS = "alarms.jsonl"
TIME_BUCKETS = 5  # equal parts of t, by each of which losses are logged


@dataclass(frozen=True)
class RunFolder:
    """One run: the images it has seen, its metrics, and when its state changed, in Unix seconds.

    `best` has the metrics of the best student, `teacher` those of the teacher in the run's evaluations. `seconds` is
    the wall time of all sessions.
    """

    folder: Path
    config: dict[str, Any]
    state: State
    images: int
    metrics: list[Metrics]
    evaluations: list[Metrics]
    best: Metrics
    alarms: list[Alarm]
    changed: float | None
    seconds: float
    teacher: Metrics

    @property
    def is_decoder(self) -> bool:
        """Whether it trains a small decoder, and not a student."""
        return self.config.get("kind") == "decoder"

    @property
    def name(self) -> str:
        """The folder's own name, also for `.`."""
        return self.folder.resolve().name

    @property
    def budget(self) -> int:
        """Images that the run is to see: its `images` in whole batches."""
        images, batch = self.config["images"], self.config.get("batch")
        return whole_batches(images, batch) if isinstance(batch, int) and batch > 0 else int(images)


def whole_batches(images: int, batch: int) -> int:
    """Images that a run sees for a budget of `images`: whole batches, because a step is never cut."""
    return -(-images // batch) * batch


def read_run(folder: Path) -> RunFolder:
    """The run in a folder. Raises RunError when there is none."""
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"{folder} is not a run: it has no config.yaml; give one that `distill run` made") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as YAML; `distill run` with the same --out writes it anew") from error
    if not (isinstance(config, dict) and "teacher" in config and isinstance(config.get("images"), int)):
        raise RunError(f"{folder} is not a run: its config.yaml names no teacher and images; give another folder")

    logs = [folder / METRICS, folder / EVALUATIONS]
    metrics, evaluations = map(_lines, logs)
    records = sorted((folder / "best").glob("[0-9]*/state.json"))
    best = _metrics(records[-1].read_text(encoding="utf-8", errors="replace")) if records else {}
    if config.get("kind") == "decoder" and evaluations:
        best = evaluations[-1]  # its last decoder is the one that is exported
    checkpoints = states(folder / "checkpoints")
    # A stop between two lines of the log is saved in a checkpoint; a kill between two checkpoints is in the log.
    images = int(max([0, *(int(path.name) for path in checkpoints), *(line["images"] for line in metrics)]))
    recorded = read_state(folder)
    if is_locked(folder):
        state: State = "running"
    elif not images:
        state = "never started"
    else:
        over = images >= config["images"] or ended_early(config, evaluations, best)
        state = "finished" if over and holds_student(folder, config["images"]) else "stopped"
    changed, seconds = (recorded.time, recorded.seconds) if recorded else (None, 0.0)
    alarms, teacher = _alarms(folder / ALARMS), _teacher_metrics(folder)
    return RunFolder(folder, config, state, images, metrics, evaluations, best, alarms, changed, seconds, teacher)


def holds_student(folder: Path, budget: int) -> bool:
    """Whether `student` is that of the run's end: exported for this budget from the newest checkpoint.

    A run that was killed before its export has none, or an older one: of a smaller budget, or exported on the way.
    """
    state = read_state(folder)
    if (
        state is None
        or not state.is_final
        or state.budget < budget
        or not any(
            (folder / product).exists() for product in (Path("student") / RECORD, Path(DECODER) / DECODER_CONFIG)
        )
    ):
        return False
    return all(int(path.name) <= state.images for path in states(folder / "checkpoints"))


def ended_early(config: Mapping[str, Any], evaluations: Sequence[Metrics], best: Metrics) -> bool:
    """Whether `early_stopping_patience` evaluations in a row found no better student, so that a run is over."""
    patience = config.get("early_stopping_patience")
    return isinstance(patience, int) and sum(line["images"] > best.get("images", 0) for line in evaluations) >= patience


def read_runs(folder: Path) -> list[RunFolder]:
    """The runs right under a folder, by name; other folders are passed over. Raises RunError when it is no folder."""
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}; give the one that your runs are in")
    runs = []
    for child in sorted(folder.iterdir()):
        with suppress(RunError):
            runs.append(read_run(child))
    return runs


def _lines(path: Path) -> list[Metrics]:
    """A log's lines; one that is no metrics, as a killed writer leaves it, is passed over."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [_metrics(line) for line in lines if images_of(line) is not None]


def images_of(line: str) -> int | None:
    """The number of images in a line of a log; None if the line is not valid."""
    images: Any = _metrics(line).get("images")
    return images if isinstance(images, int) and 0 <= images < 2**63 else None


def _teacher_metrics(folder: Path) -> Metrics:
    """The teacher's metrics as the run's evaluations measured them; none if they are unknown."""
    path = folder / TEACHER_METRICS
    return _metrics(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else {}


def _alarms(path: Path) -> list[Alarm]:
    """The alarms that a run raised; a line in another form is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        if images_of(line) is not None:
            with suppress(TypeError):
                found.append(Alarm(**json.loads(line)))
    return found


def _metrics(text: str) -> Metrics:
    """The finite numbers of a JSON object; none for anything else."""
    try:
        values = json.loads(text)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return {}
