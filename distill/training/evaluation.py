"""What happens to the averaged student on the way: samples, alarms, evaluations, the best student, early stopping."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path

import torch

from distill.config import RunConfig
from distill.evaluate.base import Evaluator, Generate, Images, evaluate
from distill.flow import noise
from distill.models.sd3 import decode_in_parts, encode_images, load_vae
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder, TextCondition
from distill.models.vae import to_images, to_pixels
from distill.report.alarms import Alarms
from distill.report.grid import labeled_grid, save_png
from distill.report.run_folder import ALARMS, EVALUATIONS, METRICS, ended_early, read_run
from distill.training import checkpoint
from distill.training.preparation import latent_shapes
from distill.training.trainer import Progress

GRID = 16  # images in a sample grid
PROMPTS_PER_TASK = 16  # of an evaluation during training


class EvaluationCallback:
    """Called after each round: saves sample grids, raises alarms, evaluates the student and keeps the best one.

    Without an evaluator nothing is scored, and the last student is exported. In a process that does not `write`, the
    callback only takes part in generating images. `stops` says that early stopping ends the run.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        teacher: SD3Folder,
        prompts: Sequence[str],
        evaluator: Evaluator | None,
        device: torch.device,
        dtype: torch.dtype,
        write: bool,
    ) -> None:
        """Load the decoder and encode all prompts; the text encoders are freed afterwards."""
        self._config = config
        self._out = out
        self._write = write
        self._shape = latent_shapes(config, teacher)[0]
        self.stops = False
        if write:
            newest = checkpoint.latest(out / "checkpoints")
            for log in (EVALUATIONS, METRICS, ALARMS):
                checkpoint.trim_lines(out / log, int(newest.name) if newest else 0)
            run = read_run(out)
            self._alarms = Alarms()
            for line in run.metrics:
                self._alarms.add(line)
            self.stops = ended_early(run.config, run.evaluations, run.best)
        self._vae = load_vae(teacher, device=device)
        text = SD3TextEncoder.load(teacher, device, dtype)
        self._eval_prompts = (
            None if evaluator is None else evaluator.prompts(PROMPTS_PER_TASK, config.seed, held_out=False)
        )
        # If there are fewer prompts than places in the grid, they repeat with other seeds.
        self._texts = list(islice(cycle(prompts), GRID))
        texts = dict.fromkeys([*self._texts, *(self._eval_prompts.texts if self._eval_prompts else ())])
        self._conditions = {prompt: text.encode([prompt]) for prompt in texts}

    def __call__(self, progress: Progress) -> None:
        """Do what is due after a round."""
        if progress.metrics and self._write:
            self._raise_alarms(progress)

        @torch.no_grad()
        def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Images:
            cond = TextCondition.cat([self._conditions[prompt] for prompt in prompts])
            return to_images(decode_in_parts(self._vae, progress.generate(cond, noise(seeds, self._shape))))

        cadence, finished = self._config.cadence, progress.images >= self._config.images
        if progress.crosses(cadence.sample) or finished:
            images = generate(self._texts, list(range(len(self._texts))))
            if self._write:
                path = self._out / "samples" / f"{progress.images:012d}.png"
                save_png(labeled_grid([("student", images)], self._texts), path)
        if self._eval_prompts is not None and (progress.crosses(cadence.evaluate) or finished):
            self._evaluate(progress, generate)

    def _raise_alarms(self, progress: Progress) -> None:
        """Check the line that was just logged."""
        for alarm in self._alarms.add({"images": progress.images, **progress.metrics}):
            progress.notes.append(f"alarm, {alarm.name}: {alarm.message}")
            with (self._out / ALARMS).open("a") as file:
                file.write(json.dumps(asdict(alarm)) + "\n")

    def _evaluate(self, progress: Progress, generate: Generate) -> None:
        assert self._eval_prompts is not None
        encode = torch.no_grad()(lambda images: encode_images(self._vae, to_pixels(images)))
        result, _ = evaluate(self._eval_prompts, generate, 1, encode, self._config.seed)
        names = ("overall", "frechet", "recall", "diversity")
        metrics: dict[str, float] = {name: getattr(result, name) for name in names}
        progress.metrics.update(metrics)
        if not self._write:
            return
        with (self._out / EVALUATIONS).open("a") as file:
            file.write(json.dumps({"images": progress.images, **metrics, **result.tasks}) + "\n")
        fitness = result.overall * result.diversity  # a collapsed student may score well
        best = checkpoint.latest(self._out / "best")
        if best is None or fitness > checkpoint.load_record(best)["fitness"]:
            target = self._out / "best" / checkpoint.state_name(progress.images)
            checkpoint.save(target, progress.average, {"images": progress.images, "fitness": fitness, **metrics})
            checkpoint.prune(self._out / "best", 1)
        run = read_run(self._out)
        self.stops = ended_early(run.config, run.evaluations, run.best)
        if self.stops and progress.images < self._config.images:
            progress.save()
            progress.notes.append(
                f"{self._config.early_stopping_patience} evaluations found no better student than that after "
                f"{run.best['images']} images; the run ends with it, as early_stopping_patience says"
            )
