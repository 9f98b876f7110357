"""The student of a run folder, finished or not."""

from pathlib import Path

import torch

from distill.config import Lora
from distill.errors import RunError, TeacherError
from distill.models.sd3_folder import SD3Folder
from distill.report.run_folder import read_run
from distill.student.export import SHARD_SIZE, export_student
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
) -> Path:
    """Export a student of the run in `out` to `student`, or to `out/student`.

    `which` is `best`, the averaged student of the best evaluation, or the last where there is none; `last`; the images
    of a checkpoint; or those of several with commas between them, whose students are averaged. `teacher` is the run's
    teacher, if it was read already or was moved. Raises RunError when there is no such checkpoint, CheckpointError for
    another teacher.
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
    states = _find_states(out, which)
    weights = _mean_weights(states)
    seen = [int(state.name) for state in states]
    # Evaluations are of one checkpoint; a mean has none.
    evaluation = next((line for line in run.evaluations if [line["images"]] == seen), {})
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


def _mean_weights(states: list[Path]) -> dict[str, torch.Tensor]:
    """The mean of the averaged students of `states`."""
    weights = _weights(states[0])
    for count, state in enumerate(states[1:], start=2):
        further = _weights(state)
        average_into(weights.values(), [further[name] for name in weights], 1 / count)
    return weights


def _weights(state: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(state, "" if state.parent.name == "best" else "average")[0]
