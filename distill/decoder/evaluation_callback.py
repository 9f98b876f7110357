"""Alarms, evaluations and grids of the averaged decoder during its training."""

from pathlib import Path

from diffusers import AutoencoderTiny

from distill.decoder.evaluation import DecoderEvaluator
from distill.decoder.recipe import DecoderConfig
from distill.files import append_line
from distill.report.alarm_log import AlarmLog
from distill.report.alarms import SMALL_DECODER
from distill.report.grid import save_png
from distill.report.run_folder import ALARMS, EVALUATIONS, METRICS, read_run
from distill.training import checkpoint
from distill.training.state import TrainingProgress


class DecoderEvaluationCallback:
    """Called after each step: raises alarms, evaluates the averaged decoder and saves a grid.

    `metrics` are those of the last evaluation, also of an earlier session that ended with it; else they are empty.
    """

    def __init__(
        self, config: DecoderConfig, out: Path, images: int, evaluator: DecoderEvaluator, average: AutoencoderTiny
    ) -> None:
        """Go on after so many images; later lines of the logs in `out` are removed."""
        self._config, self._out = config, out
        self._evaluator, self._average = evaluator, average
        for log in (EVALUATIONS, METRICS, ALARMS):
            checkpoint.trim_lines(out / log, images)
        run = read_run(out)
        last = run.evaluations[-1] if run.evaluations else {}
        ended = last.get("images") == images
        self.metrics = {name: value for name, value in last.items() if name != "images"} if ended else {}
        self._alarms = AlarmLog(run, SMALL_DECODER)

    def __call__(self, progress: TrainingProgress) -> None:
        """Do what is due after a step, and add the metrics of an evaluation to its progress."""
        if progress.metrics:
            progress.notes.extend(self._alarms.add({"images": progress.images, **progress.metrics}))
        if progress.images >= progress.total or progress.crosses(self._config.evaluate_every):
            self.evaluate(progress)
            progress.metrics.update(self.metrics)

    def evaluate(self, progress: TrainingProgress) -> None:
        """Evaluate the averaged decoder, and save the line of the log and the grid."""
        found = self._evaluator.evaluate(self._average)
        self.metrics = found.metrics
        line = {"images": progress.images, **found.metrics}
        append_line(self._out / EVALUATIONS, line)
        save_png(found.picture, self._out / "samples" / f"{progress.images:012d}.png")
        if progress.images >= progress.total / 2:  # images of early decoders are blurred in any case
            progress.notes.extend(self._alarms.add_evaluation(line))
