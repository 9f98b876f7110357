"""Comparison of a teacher and its students on the prompts and seeds of a dataset with a scorer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image

from distill.errors import SizeError
from distill.evaluate.base import FEATURES, EvalDataset, EvalPrompts, EvalResult, Images, Report, evaluate
from distill.evaluate.sampler import Sampling, StudentModel, TeacherSampler, student_sampler
from distill.models.sd3_folder import SD3Folder
from distill.pipeline import read_student
from distill.report.grid import labeled_grid
from distill.report.units import rounded

PICTURED = 4  # prompts of each task in the picture
DISTANCES = ("frechet", "kernel", "precision", "recall", "density", "coverage", "diversity", "saturation")
COST = ("nfe", "seconds_per_image")


@dataclass(frozen=True)
class DatasetComparison:
    """Results and images of a teacher's samplings and of students by name, which are compared with the first."""

    prompts: EvalPrompts
    teachers: dict[Sampling, tuple[EvalResult, Images]]
    students: dict[str, tuple[EvalResult, Images]]

    @property
    def teacher(self) -> EvalResult:
        """The teacher's result that students are compared with."""
        return next(iter(self.teachers.values()))[0]

    def as_dict(self) -> dict[str, object]:
        """Plain values: `teacher`, each student under its name, and `teachers` for further samplings."""
        others = list(self.teachers.items())[1:]
        return {
            "features": FEATURES,
            "teacher": self.teacher.as_dict(),
            **{name: result.as_dict() for name, (result, _) in self.students.items()},
            "teachers": [{**sampling.as_dict(), **result.as_dict()} for sampling, (result, _) in others],
        }

    def overview(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table with one model per row, without the tasks."""
        names = ["overall", *DISTANCES, *COST]
        results = {f"teacher, {sampling.name}": result for sampling, (result, _) in self.teachers.items()}
        results |= {name: result for name, (result, _) in self.students.items()}
        return ["", *names], [[model, *(cell(result, name) for name in names)] for model, result in results.items()]

    def picture(self) -> Image:
        """Draw the images of the first prompts of each task: the teacher above the students, captions below."""
        tasks = self.prompts.tasks
        first = {task: tasks.index(task) for task in set(tasks)}
        shown = [i for i, task in enumerate(tasks) if i - first[task] < PICTURED]
        models = {"teacher": next(iter(self.teachers.values())), **self.students}
        rows = [(f"{name}, {result.nfe} NFE", images[shown]) for name, (result, images) in models.items()]
        return labeled_grid(rows, [self.prompts.texts[i] for i in shown], columns=2 * PICTURED)


class DatasetComparer:
    """Evaluates a teacher, sampled in several ways, and students by name. One student is in memory at a time."""

    def __init__(
        self,
        teacher: SD3Folder,
        students: Mapping[str, StudentModel],
        samplings: Sequence[Sampling],
        dataset: EvalDataset,
        device: torch.device,
        student_steps: int = 1,
    ) -> None:
        """Check all models and load the teacher. Raises SizeError for a model of another size than the dataset's."""
        _check_size(teacher.path, (teacher.image_size, teacher.image_size), dataset)
        for model in students.values():
            student = read_student(model.folder)
            student.check_steps(student_steps)
            _check_size(model.folder, student.sizes[0], dataset)
        self.samplings = samplings
        self._teacher = TeacherSampler(teacher, device)
        self._students = students
        self._device = device
        self._student_steps = student_steps

    def count(self, prompts: EvalPrompts) -> int:
        """Images that all models generate together."""
        return (len(self.samplings) + len(self._students)) * prompts.count

    def run(self, prompts: EvalPrompts, seed: int, report: Report) -> DatasetComparison:
        """Evaluate the teacher, then the students; `report` is called after every batch."""
        encode = self._teacher.encode
        teachers = {}
        for sampling in self.samplings:
            generate = partial(self._teacher.generate, sampling)
            nfe = sampling.nfe(self._teacher.folder.shift)
            teachers[sampling] = evaluate(prompts, generate, nfe, encode, seed, report)
        students = {}
        for name, model in self._students.items():
            generate_student = student_sampler(model.load(self._device), self._student_steps)
            students[name] = evaluate(prompts, generate_student, self._student_steps, encode, seed, report)
            del generate_student  # frees the student before the next one is loaded
        return DatasetComparison(prompts, teachers, students)


def _check_size(folder: Path, size: tuple[int, int], dataset: EvalDataset) -> None:
    if size != dataset.size:
        scored = "x".join(map(str, dataset.size))
        raise SizeError(
            f"{folder} makes images of {size[0]}x{size[1]} pixels, and the toy dataset scores {scored}; give --prompts "
            "FILE to compare a student with its teacher's images, or evaluate a model of that size"
        )


def metric_names(result: EvalResult) -> list[str]:
    """Names of all metrics that `cell` shows, in the order of tables."""
    return ["overall", *result.tasks, *DISTANCES, *COST]


def cell(result: EvalResult, name: str) -> str:
    """Format a metric or a task's score for tables, with half of its interval's width if it has an interval."""
    value = _value(result, name)
    if name not in result.intervals:
        return rounded(value)
    low, high = result.intervals[name]
    half = (high - low) / 2
    return f"{rounded(value, half)} ± {rounded(half, half)}"


def ratio_table(teacher: EvalResult, student: EvalResult) -> list[tuple[str, str, str, str]]:
    """Rows of a table with one metric per row: name, teacher, student, and student / teacher."""
    rows = []
    for name in metric_names(teacher):
        a, b = _value(teacher, name), _value(student, name)
        rows.append((name, cell(teacher, name), cell(student, name), f"{b / a:.2f}" if a else "-"))
    return rows


def _value(result: EvalResult, name: str) -> float:
    return result.tasks[name] if name in result.tasks else float(getattr(result, name))
