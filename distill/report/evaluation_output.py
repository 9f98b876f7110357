"""The output of `distill evaluate` for a run's student: the command that makes it, and the file that holds it."""

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.config import flat
from distill.errors import RunError
from distill.report.alarms import Metrics
from distill.report.run_folder import RunFolder

# In a run folder: the output of `distill evaluate --json`, and its picture
EVALUATION, PICTURE = "evaluation.json", "teacher-vs-student.png"


def teacher_metrics(run: RunFolder) -> Metrics:
    """The teacher's metrics of the run's evaluations; else, of a dataset's scores, those of `distill evaluate`.

    A Frechet distance depends on the number of images, which differs there, so it is left out.
    """
    path = run.folder / EVALUATION
    if run.teacher or not path.exists():
        return run.teacher
    found = {name: value for name, value, _ in read_evaluation(path) if isinstance(value, int | float)}
    scores = {name.removeprefix("tasks."): value for name, value in found.items() if name != "frechet"}
    if {"overall", "diversity"} <= scores.keys():
        scores["fitness"] = scores["overall"] * scores["diversity"]
    return scores


def evaluate_command(run: RunFolder, picture: Path) -> str:
    """The `distill evaluate` command for a run's student, with the run's own images of the teacher."""
    options: dict[str, Any] = {"student": run.folder / "student", "picture": picture}
    if run.config["teacher"] != "scenes":
        prompts, settings = (group(run.config, name) for name in ("prompts", "evaluation"))
        guidance = group(group(run.config, "method"), "guidance")
        scale, layers = guidance.get("scale"), guidance.get("skip_layers")
        options |= {
            "teacher": run.config["teacher"],
            "teacher-base": run.config.get("teacher_base"),
            "prompts": settings.get("prompts") or prompts.get("source") or "prompts.txt",
            "images": settings.get("images"),
            "steps": settings.get("teacher_steps"),
            "guidance": _middle(scale),
            "skip-layers": ",".join(map(str, layers)) if isinstance(layers, list) and layers else None,
            "skip-scale": guidance.get("skip_scale") if layers else None,
            "clip": settings.get("clip"),
            "references": settings.get("references") or run.folder / "references",
        }
    given = {name: value for name, value in options.items() if value is not None}
    return shlex.join(["distill", "evaluate", *(part for name in given for part in (f"--{name}", str(given[name])))])


def read_evaluation(path: Path) -> list[tuple[str, Any, Any]]:
    """Name, teacher's value and student's value of each metric. Raises RunError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        teacher, student = (dict(flat(found[model])) for model in ("teacher", "student"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is not the output of `distill evaluate --json`; write it again or remove it") from error
    return [(name, value, student.get(name)) for name, value in teacher.items()]


def group(values: Any, name: str) -> dict[str, Any]:
    """A group of a configuration, which is taken as it stands; empty if there is none."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _middle(scale: Any) -> Any:
    """The middle of a range of guidance scales; a single scale as it is."""
    with suppress(TypeError, ZeroDivisionError):
        return sum(scale) / len(scale)
    return scale
