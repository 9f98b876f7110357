"""Samples, alarms and evaluations of the averaged student during a run; the best student, and early stopping."""

import json
from collections.abc import Sequence
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path

import torch
from accelerate import Accelerator

from distill.config import RunConfig
from distill.evaluate.base import Images
from distill.evaluate.evaluator import Evaluator, is_better
from distill.evaluate.known_prompts import KnownPrompts
from distill.files import append_line, atomic_write_text
from distill.flow import noise
from distill.models.sd3 import decode_in_parts, encode_in_parts, load_vae
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder, TextCondition
from distill.models.vae import to_images
from distill.report.alarm_log import AlarmLog
from distill.report.grid import labeled_grid, save_png
from distill.report.run_folder import ALARMS, EVALUATED, EVALUATIONS, METRICS, TEACHER_METRICS, ended_early, read_run
from distill.training import checkpoint
from distill.training.accelerator import network_dtype
from distill.training.processes import from_main
from distill.training.run_teacher import latent_shapes
from distill.training.trainer import Progress

GRID = 16  # images in a sample grid


class EvaluationCallback:
    """Called after each round: saves sample grids, raises alarms, evaluates the student and keeps the best one.

    Without an evaluator nothing is measured, and the last student is exported. A log of another evaluator is set aside,
    because its values do not compare. Only the main process writes; in the others, the callback takes part in
    generating images. `stops` says that early stopping ends the run.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        teacher: SD3Folder,
        prompts: Sequence[str],
        evaluator: Evaluator | None,
        machine: Accelerator,
    ) -> None:
        """Load the autoencoder and encode all prompts; the text encoders are freed afterwards.

        Only the main process encodes. The others take the conditions of a batch from it.
        """
        self._config = config
        self._out = out
        self._machine = machine
        self._shape = latent_shapes(config, teacher)[0]
        self._evaluator = evaluator
        self.stops = False
        self._resumed = checkpoint.images_in(out / "checkpoints")
        other = evaluator is not None and _is_of_another(evaluator, out)
        if machine.is_main_process:
            if other:
                for path in (out / EVALUATIONS, out / TEACHER_METRICS):
                    _set_aside(path)
            for log in (EVALUATIONS, METRICS, ALARMS):
                checkpoint.trim_lines(out / log, self._resumed)
            run = read_run(out)
            self._alarms = AlarmLog(run)
            self.stops = ended_early(run.config, run.evaluations, run.best)
        evaluations = [] if other else read_run(out).evaluations
        self._evaluated = any(line["images"] == self._resumed for line in evaluations)
        self._sampled = self._grid(self._resumed).exists()
        self._vae = load_vae(teacher, device=machine.device)
        # If there are fewer prompts than places in the grid, they repeat with other seeds.
        self._texts = list(islice(cycle(prompts), GRID))
        self._conditions: KnownPrompts | None = None
        if machine.is_main_process:
            text = SD3TextEncoder.load(teacher, machine.device, network_dtype(machine))
            self._conditions = KnownPrompts(text, [*self._texts, *(evaluator.prompts if evaluator else ())], out)

    def due(self, progress: Progress) -> list[str]:
        """Name what is due after a round besides logs: `sampling` and `evaluating`."""
        cadence, due = self._config.cadence, []
        if self._is_due(progress, cadence.sample, self._sampled):
            due.append("sampling")
        if self._evaluator is not None and self._is_due(progress, cadence.evaluate, self._evaluated):
            due.append("evaluating")
        return due

    def __call__(self, progress: Progress) -> None:
        """Do what is due after a round; at the start of a resumed run, also what was not done at its checkpoint."""
        due, main = self.due(progress), self._machine.is_main_process
        if progress.metrics and main:
            progress.notes.extend(self._alarms.add({"images": progress.images, **progress.metrics}))

        @torch.no_grad()
        def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Images:
            cond = self._encode(prompts)
            return to_images(decode_in_parts(self._vae, progress.generate(cond, noise(seeds, self._shape))))

        if "sampling" in due:
            images = generate(self._texts, list(range(len(self._texts))))
            if main:
                save_png(labeled_grid([("student", images)], self._texts), self._grid(progress.images))
        if self._evaluator is not None and "evaluating" in due:
            evaluation = self._evaluator.evaluate(generate, partial(encode_in_parts, self._vae))
            progress.metrics.update(evaluation.metrics)
            if main:
                if evaluation.picture is not None:
                    save_png(evaluation.picture, self._out / EVALUATED / f"{progress.images:012d}.png")
                if evaluation.teacher:
                    (self._out / EVALUATED).mkdir(exist_ok=True)
                    atomic_write_text(self._out / TEACHER_METRICS, json.dumps(evaluation.teacher) + "\n")
                self._keep(progress, self._evaluator, evaluation.metrics)

    def _encode(self, prompts: Sequence[str]) -> TextCondition:
        """The conditions of known prompts, in every process that generates their images."""
        cond = None if self._conditions is None else self._conditions.encode(prompts)
        if self._machine.is_fsdp2:
            cond = from_main(cond)
        assert cond is not None  # without a sharded base, the main process alone has a callback
        return cond

    def _is_due(self, progress: Progress, every: int, done: bool) -> bool:
        """Whether something is due: at its cadence and at the end, unless it was `done` before the run was resumed."""
        due = progress.crosses(every) or progress.images >= self._config.images
        return due and not (done and progress.images == self._resumed)

    def _grid(self, images: int) -> Path:
        return self._out / "samples" / f"{images:012d}.png"

    def _keep(self, progress: Progress, evaluator: Evaluator, metrics: dict[str, float]) -> None:
        """Keep the student if it is the best so far; record the metrics; end the run if none was for too long."""
        line = {"images": progress.images, **metrics}
        progress.notes.extend(self._alarms.add_evaluation(line))
        best = checkpoint.latest(self._out / "best")
        record = checkpoint.load_record(best) if best is not None else {}
        comparable = record.get("evaluator") == evaluator.digest
        if not comparable or is_better(evaluator, metrics[evaluator.metric], record[evaluator.metric]):
            made_with = {"metric": evaluator.metric, "evaluator": evaluator.digest}
            target = self._out / "best" / checkpoint.state_name(progress.images)
            checkpoint.save(target, progress.average, {**line, **made_with})
            checkpoint.keep_only(target)  # also of an older student with more images, if the run was resumed before it
        append_line(self._out / EVALUATIONS, line)  # last, so that a killed evaluation is made again
        self._machine.log({f"evaluation/{name}": value for name, value in metrics.items()}, progress.images)
        run = read_run(self._out)
        self.stops = ended_early(run.config, run.evaluations, run.best)
        if self.stops and progress.images < self._config.images:
            progress.save()
            progress.notes.append(
                f"{self._config.early_stopping_patience} evaluations found no better student than that after "
                f"{run.best['images']} images; the run ends with it, as early_stopping_patience says"
            )


def _is_of_another(evaluator: Evaluator, out: Path) -> bool:
    """Whether the evaluations of a run were made by another evaluator."""
    best = checkpoint.latest(out / "best")
    return best is not None and checkpoint.load_record(best).get("evaluator") != evaluator.digest


def _set_aside(path: Path) -> None:
    """Rename a file, if there is one, with the first number that is free."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    if path.exists():
        path.rename(next(name for name in names if not name.exists()))
