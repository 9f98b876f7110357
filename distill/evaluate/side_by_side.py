"""One teacher folder and its students, judged alike: what `distill evaluate` and `distill compare` run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image

from distill.errors import SizeError
from distill.evaluate.base import FEATURES, EvalPrompts, EvalResult, Images, evaluate
from distill.evaluate.sampler import Setting, TeacherSampler, student_sampler
from distill.models.sd3_folder import SD3Folder
from distill.pipeline import SHIPPED_STUDENT, OneStepPipeline, read_student
from distill.report.picture import labeled_grid
from distill.worlds.scenes.render import SIZE

SHIPPED_TEACHER = SHIPPED_STUDENT.with_name("teacher")

PICTURED = 4  # prompts of each task in the picture
DISTANCES = ("frechet", "kernel", "precision", "recall", "density", "coverage", "diversity", "saturation")
COST = ("nfe", "seconds_per_image")


@dataclass(frozen=True)
class Answers:
    """A result, and the images that it was made from."""

    result: EvalResult
    images: Images


@dataclass(frozen=True)
class Result:
    """Answers of one teacher in one or more settings, the first of which is the measure, and of students by name."""

    prompts: EvalPrompts
    teachers: dict[Setting, Answers]
    students: dict[str, Answers]

    @property
    def teacher(self) -> EvalResult:
        """The teacher that students are measured by."""
        return next(iter(self.teachers.values())).result

    def as_dict(self) -> dict[str, object]:
        """Plain values: `teacher`, one entry for each student under its name, `teachers` in their further settings."""
        others = list(self.teachers.items())[1:]
        return {
            "features": FEATURES,
            "teacher": self.teacher.as_dict(),
            **{name: answers.result.as_dict() for name, answers in self.students.items()},
            "teachers": [{**asdict(setting), **answers.result.as_dict()} for setting, answers in others],
        }

    def models(self) -> dict[str, EvalResult]:
        """The results of all models, by their names in tables."""
        teachers = {f"teacher, {setting.name}": answers.result for setting, answers in self.teachers.items()}
        return teachers | {name: answers.result for name, answers in self.students.items()}

    def picture(self) -> Image:
        """The first prompts of each task: the teacher over the students, wordings under the tiles."""
        tasks = self.prompts.tasks
        chosen = [i for i, task in enumerate(tasks) if i - tasks.index(task) < PICTURED]
        nfe = self.teacher.nfe
        rows = [(f"teacher, {nfe} NFE", next(iter(self.teachers.values())).images[chosen])]
        rows += [
            (f"{name}, {answers.result.nfe} NFE", answers.images[chosen]) for name, answers in self.students.items()
        ]
        texts = [self.prompts.texts[i] for i in chosen]
        return labeled_grid(rows, texts, columns=2 * PICTURED)


class Comparison:
    """A teacher in several settings, and students by name; students are in memory one at a time.

    `settings` are pairs of steps and guidance, None for the scale that the teacher's folder names; a repeated one is
    judged once.
    """

    def __init__(
        self,
        teacher: SD3Folder,
        students: Mapping[str, Path],
        settings: Sequence[tuple[int, float | None]],
        device: torch.device,
        student_steps: int = 1,
    ) -> None:
        if teacher.image_size != SIZE:
            raise SizeError(
                f"{teacher.path} makes {teacher.image_size} pixels a side; the scorer of the toy dataset takes {SIZE}: "
                "evaluate a teacher of that size, or render its images with `distill geneval` and hand them to a scorer"
            )
        for folder in students.values():
            student = read_student(folder)
            student.check_steps(student_steps)
            if student.sizes[0] != (SIZE, SIZE):
                raise SizeError(
                    f"{folder} makes {student.sizes[0][0]} pixels a side; the scorer of the toy dataset takes {SIZE}: "
                    "evaluate a student of that size, or render images with `distill geneval` for another scorer"
                )
        scaled = (Setting(steps, teacher.guidance if scale is None else scale) for steps, scale in settings)
        self.settings = list(dict.fromkeys(scaled))
        self._teacher = TeacherSampler(teacher, device)
        self._students = students
        self._device = device
        self._student_steps = student_steps

    def count(self, prompts: EvalPrompts) -> int:
        """Images that all make together."""
        return (len(self.settings) + len(self._students)) * prompts.count

    def run(self, prompts: EvalPrompts, seed: int, report: Callable[[int], None]) -> Result:
        """Judge the teacher, then the students; `report` hears of every batch."""
        encode = self._teacher.encode
        teachers = {}
        for setting in self.settings:
            generate = partial(self._teacher.generate, setting)
            teachers[setting] = Answers(*evaluate(prompts, generate, setting.nfe, encode, seed, report))
        students = {}
        for name, folder in self._students.items():
            student = student_sampler(OneStepPipeline.load(folder, self._device), self._student_steps)
            students[name] = Answers(*evaluate(prompts, student, self._student_steps, encode, seed, report))
        return Result(prompts, teachers, students)


def cell(result: EvalResult, name: str) -> str:
    """A figure or a task's score as tables have it, with half of its interval's width where it has one."""
    value = _value(result, name)
    if name not in result.intervals:
        return f"{value:.4g}"
    low, high = result.intervals[name]
    return f"{value:.4g} ± {(high - low) / 2:.2g}"


def figure_names(result: EvalResult) -> list[str]:
    """Everything that `cell` can be asked for, in the order of tables."""
    return ["overall", *result.tasks, *DISTANCES, *COST]


def side_by_side(teacher: EvalResult, student: EvalResult) -> list[tuple[str, str, str, str]]:
    """Every figure, one a line: its name, the teacher's, the student's, and the ratio of the two."""
    lines = []
    for name in figure_names(teacher):
        a, b = _value(teacher, name), _value(student, name)
        lines.append((name, cell(teacher, name), cell(student, name), f"{b / a:.3f}" if a else "-"))
    return lines


def overview(models: Mapping[str, EvalResult]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table with one model a line, without the tasks."""
    names = ["overall", *DISTANCES, *COST]
    return ["", *names], [[model, *(cell(result, name) for name in names)] for model, result in models.items()]


def _value(result: EvalResult, name: str) -> float:
    return result.tasks[name] if name in result.tasks else float(getattr(result, name))
