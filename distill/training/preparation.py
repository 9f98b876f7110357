"""Checks of a run, and the files that it writes before it computes anything."""

import logging
from collections.abc import Mapping
from pathlib import Path

import yaml

from distill.config import RunConfig
from distill.files import atomic_write_text
from distill.models.sd3 import check_parts
from distill.models.sd3_folder import SD3Folder
from distill.report.run_state import read_state, write_state
from distill.training.initial_weights import check_initial_weights
from distill.training.preflight import check_folder
from distill.training.run_evaluator import check_evaluator
from distill.training.run_sources import run_sources
from distill.training.run_teacher import read_config, write_pins
from distill.training.speed import SPEED
from distill.training.state_folders import has_checkpoint

_log = logging.getLogger(__name__)


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
    check_folder(config, out, teacher)
    check_evaluator(config, teacher)
    _warn_of_patience(config)
    if not has_checkpoint(out):
        check_parts(teacher)
        check_initial_weights(config, teacher)
        for source in run_sources(config, out):
            if source is not None:
                source.check(teacher)


def _warn_of_patience(config: RunConfig) -> None:
    patience, evaluations = config.early_stopping_patience, config.images // config.cadence.evaluate
    if patience is not None and evaluations <= patience:
        _log.warning(
            "early_stopping_patience %d cannot end this run: images and cadence.evaluate make %d evaluations",
            patience,
            evaluations,
        )
