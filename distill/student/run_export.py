"""The student of a run folder, finished or not."""

from pathlib import Path

import torch

from distill.config import Lora
from distill.errors import RunError, TeacherError
from distill.models.sd3_folder import SD3Folder
from distill.report.run_folder import read_run
from distill.student.export import SHARD_SIZE, export_student
from distill.training import checkpoint
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

    `which` is `best`, the averaged student of the best evaluation, or the last where there is none; `last`; or the
    images of a checkpoint. `teacher` is the run's teacher, if it was read already or was moved. Raises RunError when
    there is no such checkpoint, CheckpointError for another teacher.
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
    state = _find_state(out, which)
    weights, _ = checkpoint.load(state, "" if state.parent.name == "best" else "average")
    images = int(state.name)
    evaluation = next((line for line in run.evaluations if line["images"] == images), {})
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
        "images_seen": images,
        "prompts": {"source": source, "count": RunPrompts(config.prompts, out).count()},
        **({"sizes": config.sizes} if config.sizes else {}),
        "metrics": {name: value for name, value in evaluation.items() if name != "images"},
        "config": {**values, "teacher": teacher.reference, "prompts": {**values["prompts"], "source": source}},
    }
    lora = config.networks if isinstance(config.networks, Lora) else None
    return export_student(teacher, weights, student or out / "student", recipe, lora, dtype, max_shard_size, license)


def _find_state(out: Path, which: str) -> Path:
    """The folder of the weights that `export_run` exports."""
    if which in ("best", "last"):
        best = checkpoint.latest(out / "best") if which == "best" else None
        found = best or checkpoint.latest(out / "checkpoints")
        if found is None:
            raise RunError(f"{out} has no checkpoint yet; `distill run` with the same --out writes one")
        return found
    states = {int(path.name): path for part in ("checkpoints", "best") for path in checkpoint.states(out / part)}
    if not which.isdecimal() or int(which) not in states:
        there = ", ".join(map(str, sorted(states))) or "none"
        raise RunError(f"{out} has no checkpoint {which}; give best, last or the images of one: {there}")
    return states[int(which)]
