"""The training speed of a run, measured once over a few rounds, and the images that it makes in a time."""

import json
import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from distill import run
from distill.config import Cadence, EvaluationSettings, RunConfig
from distill.files import atomic_write_text
from distill.training.preparation import SPEED, read_speed
from distill.training.processes import wait_for_main
from distill.training.run_sources import run_sources
from distill.training.trainer import Progress

WARM = 4  # rounds before the measurement; a CUDA graph is recorded in the fourth
TIMED = 8  # rounds


def images_within(seconds: float, config: RunConfig, folder: Path) -> int:
    """Return the images, in whole batches, that a run in this folder trains on in `seconds`; its prompts are encoded.

    Learning rates decay by images, so a run needs a budget in images. The speed is measured in a temporary folder and
    stored in `speed.json` for a resumed run. Every process of a run calls this.
    """
    kept = folder / SPEED
    speed = read_speed(kept) if kept.exists() else None
    speed = broadcast_object_list([speed])[0] or _measure(config, folder)
    return max(1, int(speed * seconds / config.batch)) * config.batch


def _measure(config: RunConfig, folder: Path) -> float:
    """Measure images/s of a run's first rounds."""
    scratch = folder / ".speed"
    never = 10**12
    quiet = Cadence(log=never, sample=never, checkpoint=never, evaluate=never)
    changes: dict[str, Any] = {"images": never, "cadence": quiet, "early_stopping_patience": None, "trackers": ()}
    changes["evaluation"] = EvaluationSettings(evaluator="none")
    for name, source in zip(("prompts", "real"), run_sources(config, folder), strict=True):
        if source is not None:
            encoded = {"source": str(source.encoded.resolve()), "column": None}
            changes[name] = source.config.model_copy(update=encoded)
    endless = config.model_copy(update=changes)
    machine = run.accelerator(endless, scratch)
    if machine.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
    wait_for_main(machine)
    steps = run.run(endless, scratch, machine)
    rounds = (progress for progress in steps if isinstance(progress, Progress))
    times = []
    for count in (WARM, TIMED):
        for _ in islice(rounds, count):
            pass
        if machine.device.type == "cuda":
            torch.cuda.synchronize(machine.device)
        times.append(time.perf_counter())
    speed = TIMED * config.batch / (times[1] - times[0])
    steps.close()
    speed = float(broadcast_object_list([speed])[0])  # one number of images for all
    if machine.is_main_process:
        shutil.rmtree(scratch)
        atomic_write_text(folder / SPEED, json.dumps({"images_per_second": speed}) + "\n")
    wait_for_main(machine)
    return speed
