"""The student of a run folder, finished or not."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from distill.config import Lora, RunConfig
from distill.errors import ConfigError, RunError, TeacherError
from distill.models.sd3 import load_transformer
from distill.models.sd3_files import RECORD, read_json
from distill.models.sd3_folder import SD3Folder
from distill.report.run_folder import read_run
from distill.student.export import SHARD_SIZE, export_student
from distill.student.spec import read_record
from distill.training import checkpoint
from distill.training.ema import average_into
from distill.training.run_sources import RunPrompts
from distill.training.run_teacher import check_teacher, read_config, read_teacher


def export_run(
    out: Path,
    student: Path | None = None,
    which: str = "best",
    dtype: torch.dtype = torch.float16,
    max_shard_size: str = SHARD_SIZE,
    license: str | None = None,
    teacher: SD3Folder | None = None,
    average_with: Sequence[Path] = (),
) -> Path:
    """Export a student of the run in `out` to `student`, or to `out/student`.

    `which` is `best`, the averaged student of the best evaluation, or the last where there is none; `last`; the images
    of a checkpoint; or those of several with commas between them, whose students are averaged. The result is averaged
    with the students in the folders `average_with`, each of which counts as much as the run's. `teacher` is the run's
    teacher, if it was read already or was moved. Raises RunError when there is no such checkpoint, CheckpointError for
    another teacher, ConfigError for students that cannot be averaged with the run's.
    """
    run, config = read_run(out), read_config(out)
    if teacher is None:
        try:
            teacher = read_teacher(config, out)
        except TeacherError as error:
            if Path(config.teacher).exists():
                raise
            raise TeacherError(f"{error}; if it was moved, name its new place with --teacher") from None
    check_teacher(out, teacher)
    teacher = teacher.with_sequence_length(config.prompts.max_sequence_length)
    others = [_read_other(folder, config, teacher) for folder in average_with]
    states = _find_states(out, which)
    weights = _mean(map(_weights, states))
    weights = _mean(chain([weights], (load_transformer(other).state_dict() for other in others)))
    seen = [int(state.name) for state in states]
    # Evaluations are of one checkpoint; a mean has none.
    evaluation = next((line for line in run.evaluations if [line["images"]] == seen and not others), {})
    # A published record needs no paths of this machine.
    values, source = config.as_dict(), Path(config.prompts.source).name
    if config.teacher_base is not None:
        values["teacher_base"] = Path(config.teacher_base).name
    if config.real is not None:
        values["real"]["source"] = Path(config.real.source).name
    if config.init_from is not None:
        values["init_from"] = config.init_from.name
    recipe = {
        "name": config.name or f"{teacher.name.rpartition('/')[2]}-one-step",
        "method": config.method.name,
        "images_seen": seen[-1],
        **({"mean_of": seen} if len(seen) > 1 else {}),
        **({"averaged_with": [other.digest for other in others]} if others else {}),
        "prompts": {"source": source, "count": RunPrompts(config.prompts, out).count()},
        **({"sizes": config.sizes} if config.sizes else {}),
        "metrics": {name: value for name, value in evaluation.items() if name != "images"},
        "config": {**values, "teacher": teacher.reference, "prompts": {**values["prompts"], "source": source}},
    }
    lora = config.networks if isinstance(config.networks, Lora) else None
    return export_student(teacher, weights, student or out / "student", recipe, lora, dtype, max_shard_size, license)


def _find_states(out: Path, which: str) -> list[Path]:
    """The folders of the weights that `export_run` averages, by images."""
    if which in ("best", "last"):
        best = checkpoint.latest(out / "best") if which == "best" else None
        found = best or checkpoint.latest(out / "checkpoints")
        if found is None:
            raise RunError(f"{out} has no checkpoint yet; `distill run` with the same --out writes one")
        return [found]
    states = {int(path.name): path for part in ("checkpoints", "best") for path in checkpoint.states(out / part)}
    names = [name.strip() for name in which.split(",")]
    for name in names:
        if not name.isdecimal() or int(name) not in states:
            there = ", ".join(map(str, sorted(states))) or "none"
            raise RunError(f"{out} has no checkpoint {name}; give best, last or the images of one or more: {there}")
    return [states[images] for images in sorted(set(map(int, names)))]


def _read_other(folder: Path, config: RunConfig, teacher: SD3Folder) -> SD3Folder:
    """Read a student folder to average with. Raises ConfigError if its weights are not those of a run like this."""
    other = SD3Folder.read(folder)
    if isinstance(config.networks, Lora) or config.trained.two_times or read_record(other).any_step:
        raise ConfigError(f"--average-with {folder}: only one-step students of full copies can be averaged")
    if read_json(folder / RECORD).get("teacher_digest") != teacher.digest:
        raise ConfigError(f"--average-with {folder}: it is the student of another teacher than {teacher.reference}")
    return other


def _mean(students: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average the weights of students, of which two are in memory at a time."""
    average = next(students)
    for count, weights in enumerate(students, start=2):
        average_into(average.values(), [weights[name] for name in average], 1 / count)
    return average


def _weights(state: Path) -> dict[str, Tensor]:
    return checkpoint.load(state, "" if state.parent.name == "best" else "average")[0]
