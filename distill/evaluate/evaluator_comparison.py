"""Comparison of students and samplings of a teacher by one evaluator: one table with a metric per row."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from PIL.Image import Image

from distill.evaluate.base import Generate, Report
from distill.evaluate.evaluator import Evaluation, Evaluator
from distill.evaluate.sampler import StudentModel, student_sampler
from distill.models.sd3 import encode_in_parts, load_vae
from distill.models.sd3_folder import SD3Folder
from distill.report.units import rounded


@dataclass(frozen=True)
class EvaluatorComparison:
    """The evaluation of each model by name. `teacher` has the metrics of the teacher's images, where they are known."""

    models: dict[str, Evaluation]

    @property
    def teacher(self) -> dict[str, float]:
        """The metrics of the teacher's own images; empty if the evaluator has none."""
        return next(iter(self.models.values())).teacher

    @property
    def picture(self) -> Image | None:
        """The prompts on which the first model differs most from the teacher."""
        return next(iter(self.models.values())).picture

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: a metric per row; the teacher and each model are the columns."""
        columns = self.as_dict()
        names = next(iter(self.models.values())).metrics
        return ["", *columns], [[name, *(rounded(found[name]) for found in columns.values())] for name in names]

    def as_dict(self) -> dict[str, dict[str, float]]:
        """The metrics of the teacher's images, where they are known, and of each model."""
        teacher = {"teacher": self.teacher} if self.teacher else {}
        return teacher | {name: evaluation.metrics for name, evaluation in self.models.items()}


def compare_by_evaluator(
    evaluator: Evaluator,
    teacher: SD3Folder,
    students: Mapping[str, StudentModel],
    size: tuple[int, int],
    device: torch.device,
    report: Report,
    steps: int = 1,
    others: Mapping[str, Generate] | None = None,
) -> EvaluatorComparison:
    """Evaluate students of a (width, height), one in memory at a time, and then `others`. Raises SizeError."""
    encode = partial(encode_in_parts, load_vae(teacher, device=device))
    models = {}
    for name, model in students.items():
        generate = student_sampler(model.load(device), steps, size)
        models[name] = evaluator.evaluate(generate, encode, report)
        del generate  # frees the student before the next one is loaded
    models |= {name: evaluator.evaluate(generate, encode, report) for name, generate in (others or {}).items()}
    return EvaluatorComparison(models)
