"""One teacher folder and one student folder, judged alike: what `distill evaluate` runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from distill.errors import SizeError
from distill.evaluate.judge import Images, Judgement, Questions, judge
from distill.evaluate.picture import labelled_grid, save_png
from distill.flow import noise
from distill.pipeline import SHIPPED_STUDENT, OneStepPipeline
from distill.scenes.captions import TASKS
from distill.scenes.render import SIZE
from distill.scenes.vae import to_images, to_pixels
from distill.teacher import (
    decode_latents,
    encode_images,
    guided,
    load_transformer,
    load_vae,
    read_spec,
    sample,
    velocity,
)
from distill.text import SD3TextEncoder

SHIPPED_TEACHER = SHIPPED_STUDENT.with_name("teacher")

PICTURED = 4  # prompts of each task in the picture


class TeacherSampler:
    """A teacher folder as a function from prompts and seeds to images, by `steps` guided Euler steps."""

    def __init__(self, folder: Path, steps: int, guidance: float | None, device: torch.device) -> None:
        self.spec = read_spec(folder)
        self.steps = steps
        self.guidance = self.spec.guidance if guidance is None else guidance
        self.text = SD3TextEncoder.load(folder, device)
        self.vae = load_vae(folder, device=device)
        self.transformer = load_transformer(folder, device=device)

    @property
    def calls(self) -> int:
        """Evaluations of the network per image; guidance takes two a step."""
        return self.steps * (1 if self.guidance == 1 else 2)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Images:
        """Images (N, H, W, 3) at the teacher's native size."""
        side = self.spec.sample_size
        z = noise(seeds, (self.spec.latent_channels, side, side)).to(self.transformer.device)
        u = guided(partial(velocity, self.transformer), self.text.encode([""]), self.guidance)
        latents = sample(u, z, self.text.encode(prompts), self.steps, self.spec.shift)
        return to_images(decode_latents(self.vae, latents))

    @torch.no_grad()
    def encode(self, images: Images) -> torch.Tensor:
        """Latents (N, C, h, w) of images."""
        return encode_images(self.vae, to_pixels(images))


@dataclass(frozen=True)
class Result:
    """Both judgements, and the images they were made from."""

    teacher: Judgement
    student: Judgement
    questions: Questions
    teacher_images: Images
    student_images: Images

    def as_dict(self) -> dict[str, object]:
        """The form that `--json` prints."""
        return {"teacher": self.teacher.as_dict(), "student": self.student.as_dict()}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Lines of the table: what, teacher, student, and the ratio of the two."""
        t, s = self.teacher, self.student
        lines = [("overall", t.overall, s.overall)]
        lines += [(task, t.tasks[task], s.tasks[task]) for task in TASKS if task in t.tasks]
        lines += [("frechet", t.frechet, s.frechet), ("diversity", t.diversity, s.diversity)]
        lines += [
            ("calls", t.calls, s.calls),
            ("seconds_per_image", t.seconds_per_image, s.seconds_per_image),
        ]
        return [(name, f"{a:.4g}", f"{b:.4g}", f"{b / a:.3f}" if a else "-") for name, a, b in lines]

    def save_picture(self, path: Path) -> None:
        """The first prompts of each task, teacher over student, wordings under the tiles."""
        per_task = len(self.questions.texts) // len(TASKS)
        chosen = [k * per_task + i for k in range(len(TASKS)) for i in range(min(PICTURED, per_task))]
        rows = [
            (f"teacher, {self.teacher.calls} calls", self.teacher_images[chosen]),
            (f"student, {self.student.calls} call", self.student_images[chosen]),
        ]
        texts = [self.questions.texts[i] for i in chosen]
        save_png(labelled_grid(rows, texts, columns=2 * PICTURED), path)


class Comparison:
    """Loads both models; `run` judges them."""

    def __init__(
        self,
        teacher: Path,
        student: Path,
        per_task: int,
        steps: int,
        guidance: float | None,
        seed: int,
        device: torch.device,
        held_out: bool = True,
    ) -> None:
        self._teacher = TeacherSampler(teacher, steps, guidance, device)
        spec = self._teacher.spec
        if spec.sample_size * spec.vae_scale_factor != SIZE:
            raise SizeError(
                f"{teacher} makes {spec.sample_size * spec.vae_scale_factor} pixels a side; "
                f"the scorer of the small world takes {SIZE}: judge a teacher of that size"
            )
        self._student = OneStepPipeline.load(student, device)
        self._questions = Questions.make(per_task, seed, held_out)
        self._seed = seed

    @property
    def count(self) -> int:
        """Images that both make together."""
        return 2 * self._questions.count

    def run(self, report: Callable[[int], None]) -> Result:
        """Judge the teacher, then the student; `report` hears of every batch."""

        def student(prompts: Sequence[str], seeds: Sequence[int]) -> Images:
            return np.asarray(self._student(prompts, seeds))

        encode = self._teacher.encode
        a, a_images = judge(self._questions, self._teacher, self._teacher.calls, encode, self._seed, report)
        b, b_images = judge(self._questions, student, 1, encode, self._seed, report)
        return Result(a, b, self._questions, a_images, b_images)
