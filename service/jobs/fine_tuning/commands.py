"""The `distill` commands of a job, as words for this Python."""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from service.errors import NotFound, quoted
from service.jobs.fine_tuning.options import DistillationOptions
from service.jobs.fine_tuning.run_process import environment
from service.setting_types import HUB_MODEL, SHIPPED_TEACHER

log = logging.getLogger(__name__)

INDEX = "model_index.json"
DISTILL = (sys.executable, "-m", "distill.cli")


def find_teacher(teachers: Mapping[str, str], model: str) -> str:
    """Return the argument of `distill run` for a teacher of the server. Raises NotFound."""
    teacher = teachers.get(model)
    if teacher is None:
        known = ", ".join(teachers) or "none"
        raise NotFound(f"there is no teacher {quoted(model)}; this server has {known}", "model", "model_not_found")
    if teacher != SHIPPED_TEACHER and not (_is_pipeline(teacher) or _is_fetched(teacher)):
        raise NotFound(f"the teacher {model!r} is not on the server; ask who runs it", "model", "model_gone")
    return teacher


def check_fetched(teacher: str, model: str) -> None:
    """Raise NotFound if a model of the hub is only partly in its cache, and log what is missing for the operator.

    This takes a second, because a process of its own reads the model as a run does.
    """
    if teacher == SHIPPED_TEACHER or Path(teacher).is_dir():
        return
    checked = subprocess.run([*DISTILL, "fetch", teacher], env=environment(["cpu"]), capture_output=True, text=True)
    if checked.returncode:
        log.warning("the teacher %s cannot be used: %s", model, checked.stderr.strip())
        raise NotFound(f"the teacher {model!r} is not wholly on the server; ask who runs it", "model", "model_gone")


def _is_pipeline(teacher: str) -> bool:
    return (Path(teacher) / INDEX).is_file()


def _is_fetched(teacher: str) -> bool:
    """Whether a model of the hub is in its cache. Jobs never fetch any: they have no network to the hub."""
    from huggingface_hub import try_to_load_from_cache  # here, because most servers need none of it

    model = HUB_MODEL.fullmatch(teacher)
    return model is not None and isinstance(try_to_load_from_cache(model[1], INDEX, revision=model[2]), str)


def run_command(options: DistillationOptions, teacher: str, prompts: Path, seed: int, folder: Path) -> list[str]:
    """Return the command of a run. The same command resumes it."""
    assert options.preset is not None
    words = [*DISTILL, "run", options.preset, "--out", str(folder)]
    if options.seconds is not None:
        words += ["--seconds", str(options.seconds)]
    sets = [f"teacher={json.dumps(teacher)}", f"prompts.source={json.dumps(str(prompts))}", f"seed={seed}"]
    return words + [part for each in (*sets, *options.overrides()) for part in ("--set", each)]


def report_command(run: Path, page: Path) -> list[str]:
    """Return the command that writes the report of a run."""
    return [*DISTILL, "report", str(run), "--out", str(page)]


def prompts_command(options: DistillationOptions, prompts: Path) -> list[str]:
    """Return the command that validates a file of prompts. Its errors are those of a run."""
    column = [] if options.column is None else [f"--column={options.column}"]
    return [*DISTILL, "prompts", "stats", str(prompts), *column]
