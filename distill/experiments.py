"""Experiments: several distillations of one teacher with equal budgets, as `distill compare` runs them.

Each variant is an ordinary run in its own folder below the experiment's folder. The same command therefore resumes an
experiment, and a finished run is not repeated.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from distill.config import RunConfig
from distill.errors import ConfigError, RunError
from distill.evaluate.base import FEATURES, Report
from distill.evaluate.dataset_comparison import DatasetComparer, DatasetComparison, cell, metric_names
from distill.evaluate.datasets import EVAL_DATASETS
from distill.evaluate.evaluator_comparison import compare_by_evaluator
from distill.evaluate.reference_evaluator import FEATURES as REFERENCE_FEATURES
from distill.evaluate.sampler import Sampling, StudentModel, TeacherSampler
from distill.files import atomic_write_text
from distill.methods.policies import TeacherGuidance
from distill.models.sd3_folder import SD3Folder
from distill.options import DecoderChoice
from distill.pipeline import read_student
from distill.report.grid import labeled_grid, save_png
from distill.report.run_folder import read_run
from distill.report.units import rounded
from distill.training import checkpoint
from distill.training.run_evaluator import (
    REFERENCES,
    evaluated_size,
    evaluator_kind,
    run_evaluator,
    run_references,
    teacher_sampling,
)
from distill.training.run_sources import RunPrompts, run_sources
from distill.training.run_teacher import read_teacher
from distill.variants import NOTE, Variant

SHOWN = 8  # prompts in the picture, except of a dataset with a scorer


def share_caches(variant: Variant, variants: Sequence[Variant], out: Path) -> None:
    """Link a run to what the first variant with the same sources has in its folder.

    These are the caches of prompts and of real images, and the teacher's images of the prompts.
    """
    prompts, reals = run_sources(variant.config, out / variant.name)
    folders = {REFERENCES: {"prompts"}}  # and the settings that their content depends on
    if not prompts.is_cache:
        folders[prompts.folder] = {"prompts"}
    if reals is not None and not reals.is_cache:
        folders[reals.folder] = {"prompts", "real"}  # captions have the length of prompts
    for folder, keys in folders.items():
        sources = variant.config.model_dump(include=keys)
        alike = (each.name for each in variants if each.config.model_dump(include=keys) == sources)
        owner = next((name for name in alike if not (out / name).is_file()), variant.name)
        link = out / variant.name / folder
        if owner != variant.name and not os.path.lexists(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            (out / owner / folder).mkdir(parents=True, exist_ok=True)  # the owner's run may have failed early
            link.symlink_to(Path("..") / owner / folder)


def check_budget(variant: Variant, out: Path) -> None:
    """Raise ConfigError if the variant's run exceeds the budget, which would favor it."""
    folder, config = out / variant.name, variant.config
    try:
        images = read_run(folder).images
    except RunError:
        return
    if images >= config.images + config.batch:  # a run ends with a whole batch
        raise ConfigError(
            f"{folder} has seen {images} images, more than the budget of {config.images}; raise the budget, "
            "or give another --out"
        )


@dataclass(frozen=True)
class Cost:
    """The cost of a run: images, seconds of training, and the images seen by the exported student."""

    images: int
    seconds: float
    exported: int


def read_cost(folder: Path) -> Cost:
    """Read the cost of a finished run. Raises RunError if its checkpoints are missing."""
    newest = checkpoint.latest(folder / "checkpoints")
    if newest is None:
        raise RunError(f"{folder} holds no checkpoint, so its seconds are unknown; remove the folder to repeat the run")
    record = checkpoint.load_record(newest)
    return Cost(int(record["images"]), float(record.get("seconds", 0)), read_student(folder / "student").images_seen)


@dataclass(frozen=True)
class Measurements:
    """Metrics of each run and, where they are known, of the `teacher`; `cells` has them as text for the table.

    Empty without an evaluator. `features` names those of the distances; `note` says what the table does not.
    """

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: dict[str, dict[str, str]] = field(default_factory=dict)
    features: str = ""
    note: str = ""


@dataclass(frozen=True)
class ExperimentResult:
    """Commands, costs, metrics and a picture of the runs that have a student.

    `diverged` and `failed` say why the others, by name, have none.
    """

    commands: dict[str, str]
    costs: dict[str, Cost]
    measured: Measurements
    picture: Image
    diverged: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `teacher`, `runs`, and `diverged` and `failed` if there are any."""
        runs = {
            name: {"command": self.commands[name], **asdict(cost), **self.measured.metrics.get(name, {})}
            for name, cost in self.costs.items()
        }
        known = {"features": self.measured.features, "teacher": self.measured.metrics.get("teacher")}
        teacher = {name: value for name, value in known.items() if value}
        without = {"diverged": dict(self.diverged), "failed": dict(self.failed)}
        return {**teacher, "runs": runs, **{state: reasons for state, reasons in without.items() if reasons}}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: a cost or metric per row; the teacher and each run are the columns."""
        cells = self.measured.cells
        columns = {"teacher": cells["teacher"]} if "teacher" in cells else {}
        for name, cost in self.costs.items():
            costs = {"images": str(cost.images), "seconds": f"{cost.seconds:.0f}", "exported": str(cost.exported)}
            columns[name] = costs | cells.get(name, {})
        for state, reasons in (("diverged", self.diverged), ("failed", self.failed)):
            columns |= {name: {"images": state} for name in reasons}
        names = ["images", "seconds", "exported", *next(iter(cells.values()), {})]
        return ["", *columns], [[name, *(values.get(name, "-") for values in columns.values())] for name in names]

    def save(self, out: Path, record: Mapping[str, Any]) -> None:
        """Write `compare.json`, `compare.md` and `compare.png`; `record` holds the command and the budget."""
        values = json.dumps({**record, **self.as_dict()}, indent=2)
        atomic_write_text(out / "compare.json", values + "\n")
        header, lines = self.table()
        rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
        text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        text += f"\n{NOTE}\n"
        text += f"{self.measured.note}\n" if self.measured.note else ""
        for state, reasons in (("diverged", self.diverged), ("failed", self.failed)):
            text += "".join(f"\n{name} {state}: {reason}.\n" for name, reason in reasons.items())
        text += f"\n```sh\n{record['command']}\n```\n\nEach run alone:\n\n```sh\n"
        text += "".join(f"{command}\n" for command in self.commands.values())
        atomic_write_text(out / "compare.md", f"{text}```\n")
        save_png(self.picture, out / "compare.png")


@dataclass(frozen=True)
class ComparisonOptions:
    """How the students of an experiment are evaluated.

    `per_task` prompts of each task and `seed` are those of a dataset with a scorer; `steps` sample the teacher.
    `decoder` is that of `RuntimeOptions`; a folder of a small decoder serves all, because they share the VAE.
    """

    per_task: int
    steps: int
    seed: int
    decoder: DecoderChoice = "auto"


def evaluate_variants(
    variants: Sequence[Variant], out: Path, options: ComparisonOptions, device: torch.device, report: Report
) -> ExperimentResult:
    """Evaluate all students by the first variant's evaluator. With the evaluator `none` only the picture is drawn."""
    config, first = variants[0].config, out / variants[0].name
    teacher = read_teacher(config, first)
    students = {variant.name: StudentModel(out / variant.name / "student", options.decoder) for variant in variants}
    commands = {variant.name: variant.command(out) for variant in variants}
    costs = {variant.name: read_cost(out / variant.name) for variant in variants}
    kind = evaluator_kind(config, teacher)
    if kind in EVAL_DATASETS:
        dataset = EVAL_DATASETS[kind]()
        sampling = Sampling(options.steps, TeacherGuidance(scale=teacher.guidance))
        comparison = DatasetComparer(teacher, students, [sampling], dataset, device)
        found = comparison.run(dataset.prompts(options.per_task, options.seed), options.seed, report)
        return ExperimentResult(commands, costs, _of_dataset(found), found.picture())

    settings = config.evaluation.model_copy(update={"teacher_steps": options.steps})
    prompts = RunPrompts(config.prompts, first).first(max(SHOWN, settings.images))
    models = _Models(config.model_copy(update={"evaluation": settings}), teacher, students, device)
    measured = models.measure(first, prompts, report)
    picture = models.draw(list(islice(cycle(prompts), SHOWN)), options.seed)
    return ExperimentResult(commands, costs, measured, picture)


def _of_dataset(found: DatasetComparison) -> Measurements:
    """Scores of teacher and students on a dataset."""
    results = {"teacher": found.teacher, **{name: result for name, (result, _) in found.students.items()}}
    cells = {name: {each: cell(result, each) for each in metric_names(result)} for name, result in results.items()}
    note = f"±: half of a 95 % interval over prompts. Distances: to real images, on features {FEATURES}."
    return Measurements({name: result.as_dict() for name, result in results.items()}, cells, FEATURES, note)


@dataclass(frozen=True)
class _Models:
    """A teacher and its students by name, which are evaluated as `config`, that of the first run, says."""

    config: RunConfig
    teacher: SD3Folder
    students: Mapping[str, StudentModel]
    device: torch.device

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the images."""
        return evaluated_size(self.config, self.teacher)

    def measure(self, folder: Path, prompts: Sequence[str], report: Report) -> Measurements:
        """Evaluate the students by the evaluator of the run in `folder`."""
        features = note = ""
        if references := run_references(self.config, self.teacher, folder, prompts):
            features = REFERENCE_FEATURES
            note = f"Distances: to the teacher's images ({references.sampling.name}), on features {features}."
            for _ in references.make(self.device):
                pass
        evaluator = run_evaluator(self.config, self.teacher, folder, prompts, self.device)
        if evaluator is None:
            return Measurements()
        found = compare_by_evaluator(evaluator, self.teacher, self.students, self.size, self.device, report)
        metrics: dict[str, dict[str, Any]] = {**found.as_dict()}
        cells = {model: {name: rounded(value) for name, value in values.items()} for model, values in metrics.items()}
        return Measurements(metrics, cells, features, note)

    def draw(self, texts: Sequence[str], seed: int) -> Image:
        """Draw a row of the teacher's images and a row of each student's, sampled as in the evaluations of a run."""
        seeds, sampling = range(seed, seed + len(texts)), teacher_sampling(self.config)
        shape = self.teacher.latent_shape_of(*self.size)
        sampler = TeacherSampler(self.teacher, self.device, texts)  # without its text encoders in memory
        images = [sampler.generate(sampling, [text], [each], shape) for text, each in zip(texts, seeds, strict=True)]
        rows = [(f"teacher, {sampling.nfe(self.teacher.shift)} NFE", np.concatenate(images))]
        del sampler  # one model in memory at a time
        for name, model in self.students.items():
            made = model.load(self.device)(texts, seeds, *self.size)
            rows.append((f"{name}, 1 NFE", np.asarray(made)))
        return labeled_grid(rows, texts)
