"""Checks of a run before PyTorch is imported: its teacher, its folder, and sources that cannot be read."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distill.config import Prompts, RealImages, RunConfig
from distill.data.images import ENCODED, read_examples
from distill.data.prompt_files import EMBEDDED
from distill.data.prompts import read_prompts
from distill.data.sources import PROMPT_SOURCES
from distill.errors import ClaimedError, ConfigError, OutputError
from distill.evaluate.datasets import EVAL_DATASETS
from distill.models.sd3_folder import SD3Folder
from distill.models.teacher import check_named, is_single_file
from distill.report.run_folder import ALARMS, EVALUATED, EVALUATIONS, METRICS
from distill.report.run_state import STATE
from distill.student.place import check_place
from distill.training.run_lock import is_locked
from distill.training.run_teacher import (
    PINS,
    SOURCES,
    TEXTS,
    check_teacher,
    latent_shapes,
    open_pinned,
    pin_teachers,
    read_config,
)
from distill.training.state_folders import has_checkpoint

_RUN_FILES = ("checkpoints", "best", "student", "samples", EVALUATED, PINS, SOURCES, TEXTS, METRICS, EVALUATIONS,
              ALARMS, STATE)  # fmt: skip


def preflight(config: RunConfig, out: Path) -> SD3Folder | None:
    """Refuse a run that cannot begin; return its teacher. Nothing is written; `check_run` checks what needs PyTorch.

    A teacher in a single file is only looked for, because PyTorch converts it; None is returned. Raises what
    `check_folder` and `check_source` raise, TeacherError, and ClaimedError while another process writes to the folder.
    """
    check_named(config.teacher)  # first, because the other sources may be files that its training writes
    check_evaluator_name(config.evaluation.evaluator)
    check_evaluation_prompts(config.evaluation.prompts)
    if is_locked(out):
        raise ClaimedError(f"another run is writing to {out}; wait for it, or give another --out")
    if not has_checkpoint(out):
        if config.init_from is not None and not config.init_from.is_dir():
            raise ConfigError(f"init_from: {config.init_from} is no folder; give the folder of a run or of a student")
        check_source(config.prompts, read_prompts)
        if config.real is not None:
            check_source(config.real, read_examples)
    if is_single_file(config.teacher, config.teacher_base):
        return None
    teacher = open_pinned(config, pin_teachers(config, out))  # last, because it may be fetched
    check_folder(config, out, teacher)
    return teacher


def check_folder(config: RunConfig, out: Path, teacher: SD3Folder) -> None:
    """Check that the run fits the teacher and that `out` is new or holds the same run.

    Raises SizeError, ConfigError for `method.guidance.skip_layers` that the teacher lacks, CheckpointError if `out`
    holds a run of another configuration, and OutputError if a run would replace files there that belong to no run.
    """
    latent_shapes(config, teacher)
    config.method.guidance.check_layers(teacher.layers)
    path = out / "config.yaml"
    if path.exists():
        before = read_config(out)
        if has_checkpoint(out):
            config.check_same(before.identity(), path)
            check_teacher(out, teacher)
    else:
        for name in _RUN_FILES:
            if (out / name).exists():
                raise OutputError(f"{out} holds {name}, but no config.yaml of a run; give another --out")
    check_place(out / "student", teacher.path)


def check_evaluator_name(name: str) -> None:
    """Raise ConfigError for an `evaluation.evaluator` that does not exist."""
    known = ("auto", "reference", "clip", "none", *EVAL_DATASETS)
    if name not in known:
        raise ConfigError(f"evaluation.evaluator: there is no {name!r}; there are {', '.join(known)}")


def check_evaluation_prompts(source: str | None) -> None:
    """Read the first prompt of `evaluation.prompts`. Raises PromptError, and ConfigError for a stream."""
    if source is None:
        return
    if is_stream(source):
        raise ConfigError(
            f"evaluation.prompts: {source} is a stream, and a run reads these prompts at every start; name a file"
        )
    next(read_prompts(source), None)


def check_source(config: Prompts | RealImages, read: Callable[..., Iterator[Any]]) -> None:
    """Read the first row of a source, unless it is built in, a stream or a cache. Raises PromptError or ImageError."""
    path = Path(config.source)
    if config.source in PROMPT_SOURCES or any((path / name).exists() for name in (EMBEDDED, ENCODED)):
        return
    if not is_stream(config.source):
        next(read(config.source, config.max_count, config.seed, config.column), None)


def is_stream(source: str) -> bool:
    """Whether a source can be read only once: standard input, or a pipe as in `<(zcat prompts.gz)`."""
    path = Path(source)
    return source == "-" or (path.exists() and not path.is_dir() and not path.is_file())
