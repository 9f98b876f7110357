"""One distillation from configuration to student folder: what `distill run`, `distill compare` and jobs call.

The same call resumes a run. docs/distill.md lists the files of the run folder.
"""

import gc
import shutil
import time
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from distill.config import Cadence, EvaluationSettings, RunConfig
from distill.data.embedding_cache import EmbedProgress
from distill.data.image_cache import EncodeProgress
from distill.evaluate.references import ReferenceProgress
from distill.models.device import fast_bfloat16
from distill.models.sd3_folder import SD3Folder
from distill.philox import key_of
from distill.plan.run_estimate import RunEstimate, estimate_run
from distill.report.run_folder import ended_early, holds_student, read_run
from distill.report.run_state import StateRecorder, read_state
from distill.student.run_export import export_run
from distill.training import checkpoint
from distill.training.accelerator import accelerator_for, check, mesh, network_dtype
from distill.training.evaluation import GRID, EvaluationCallback
from distill.training.initial_weights import read_initial_weights
from distill.training.networks import build
from distill.training.preparation import check_run, prepare
from distill.training.processes import from_main, wait_for_main
from distill.training.run_evaluator import evaluator_kind, run_evaluator, run_references
from distill.training.run_lock import run_lock
from distill.training.run_sources import RunPrompts, check_digests, run_sources, write_digests
from distill.training.run_teacher import latent_shapes, open_pinned, pin_teachers
from distill.training.speed import images_within, read_speed, write_speed
from distill.training.state_folders import has_checkpoint
from distill.training.trainer import Progress, train

WARM = 4  # rounds before the measurement of the speed; a CUDA graph is recorded in the fourth
TIMED = 8  # rounds that are measured

if find_spec("distill.worlds") is not None:  # the folder of toy datasets may be deleted
    from distill import worlds  # noqa: F401  registers their sources


@dataclass(frozen=True)
class Activity:
    """What the run does until its next progress: sampling, evaluating, or both. It is shown to the user."""

    name: str


def run(
    config: RunConfig,
    out: Path,
    machine: Accelerator,
    seconds: float | None = None,
    teacher: SD3Folder | None = None,
) -> Generator[RunEstimate | EmbedProgress | EncodeProgress | ReferenceProgress | Activity | Progress]:
    """Distill to the budget and export the student to `out/student`; resume what is there, and skip a finished run.

    All processes of a run call this. The main process also yields what an unfinished run needs, and the progress of
    encoding and of sampling the teacher. `seconds` of training are a budget in place of `config.images`. `teacher` is
    the run's teacher if it was opened already.

    Close the generator to interrupt the run, after `progress.save()` to keep what was trained since the last
    checkpoint. Raises what `check_run` raises, ClaimedError while another process writes to the folder, OutputError if
    its disk is too small, CacheError if the sources have changed, and DivergedError.
    """
    main, device, state = machine.is_main_process, machine.device, StateRecorder(out, config.images)

    # 1. check, before the folder is made
    pins = from_main(pin_teachers(config, out) if main else {})
    teacher = teacher or open_pinned(config, pins)
    if main:
        check_run(config, out, teacher)
    with run_lock(out) if main else nullcontext():
        # 2. write the configuration, encode prompts and real images
        prompts, reals = run_sources(config, out)
        finished = main and is_finished(config, out)
        if main:
            resumed = has_checkpoint(out)
            if not finished:
                estimate = estimate_run(config, out, teacher, prompts, device, machine.num_processes, reals)
                estimate.check_disk(out)
                yield estimate
            prepare(config, out, pins)
            for source in (prompts, reals):
                if source is None or (finished and not source.is_encoded):
                    continue
                with nullcontext() if source.is_encoded else state.phase("encoding"):
                    yield from source.encode(teacher, device, resumed)

            # 3. sample the teacher, for the images that evaluations compare with
            references = None if finished else run_references(config, teacher, out, _first_prompts(config, prompts))
            if references is not None and references.missing():
                with state.phase("sampling"):
                    yield from references.make(device)
        wait_for_main(machine)

        # 4. turn seconds into images
        if seconds is not None:
            speed = from_main(read_speed(out) if main else None) or _measure_speed(config, out)
            state.budget = images_within(seconds, speed, config.batch)
            config = config.model_copy(update={"images": state.budget})
            if main:
                prepare(config, out, pins)
                finished = is_finished(config, out)

        # 5. train, unless the run is finished
        finished = from_main(finished)
        if finished and not all(source.is_encoded for source in (prompts, reals) if source is not None):
            return
        conditions = prompts.open(teacher, None if finished else device)
        images = None if reals is None else reals.open(teacher, None if finished else device)
        digests = check_digests(out, teacher, conditions, images, has_checkpoint(out))
        if finished:
            return
        if main:
            write_digests(out, digests)
        # The callback comes first: it holds the text encoders for a moment, when no network takes up memory yet. A
        # sharded base needs all processes to generate images; one of them writes.
        callback = None
        if main or machine.is_fsdp2:
            texts = _first_prompts(config, prompts)
            evaluator = run_evaluator(config, teacher, out, texts, device)
            callback = EvaluationCallback(config, out, teacher, texts, evaluator, machine)
        wait_for_main(machine)
        torch.manual_seed(key_of(config.seed, "weights"))
        networks = build(teacher, config.networks, network_dtype(machine), device, config.trained, mesh(machine))

        state.images = checkpoint.images_in(out / "checkpoints")
        shapes = latent_shapes(config, teacher)
        start = None if config.init_from is None else partial(read_initial_weights, config, teacher, device)
        rounds = train(config, out, networks, conditions, shapes, machine, images, teacher.shift, start)
        stops = from_main(callback is not None and callback.stops)
        with state.phase("training") if main else nullcontext():
            for progress in () if stops else rounds:
                state.images = progress.images
                if callback is not None:
                    if main and (due := callback.due(progress)):
                        yield Activity(" and ".join(due))
                    callback(progress)
                wait_for_main(machine)
                if main and progress.metrics:
                    state.record("training")
                yield progress
                if progress.crosses(config.cadence.evaluate) and from_main(callback is not None and callback.stops):
                    stops = True
                    break

            # 6. export
            if main:
                # Without an evaluator the last one, also if earlier sessions of the run had an evaluator.
                which = "last" if evaluator_kind(config, teacher) == "none" else "best"
                export_run(out, which=which, teacher=teacher)
                state.record("ended early" if stops and state.images < config.images else "finished")
        wait_for_main(machine)


def accelerator(config: RunConfig, out: Path) -> Accelerator:
    """Accelerate with the run's precision. Raises ConfigError for what this machine does not support."""
    probe = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and fast_bfloat16(probe))
    machine = accelerator_for("bf16" if bf16 else "no", out, config.trackers)
    check(config, machine)
    return machine


def is_finished(config: RunConfig, out: Path) -> bool:
    """Whether the run in `out` has exported its student and needs no more training, so that no model need be loaded.

    Its checkpoints may have been removed to save disk space.
    """
    state, checkpoints = read_state(out), out / "checkpoints"
    if state is None or not holds_student(out, config.images):
        return False
    found, images = read_run(out), checkpoint.images_in(checkpoints) if checkpoint.states(checkpoints) else state.images
    kept = [line for line in found.evaluations if line["images"] <= images]  # a killed run resumes from its checkpoint
    evaluation = config.as_dict()["evaluation"]  # of another evaluator, it may find a better student yet
    return images >= config.images or (
        found.config.get("evaluation") == evaluation and ended_early(config.as_dict(), kept, found.best)
    )


def _first_prompts(config: RunConfig, prompts: RunPrompts) -> list[str]:
    """The run's first prompts, as many as sample grids and evaluations take."""
    return prompts.first(max(GRID, config.evaluation.images))


def _measure_speed(config: RunConfig, out: Path) -> float:
    """Measure images/s of a run's first rounds, in a temporary folder, and keep them; its prompts are encoded.

    Every process of a run calls this.
    """
    scratch = out / ".speed"
    never = 10**12
    quiet = Cadence(log=never, sample=never, checkpoint=never, evaluate=never)
    changes: dict[str, Any] = {"images": never, "cadence": quiet, "early_stopping_patience": None, "trackers": ()}
    changes["evaluation"] = EvaluationSettings(evaluator="none")
    for name, source in zip(("prompts", "real"), run_sources(config, out), strict=True):
        if source is not None:
            encoded = {"source": str(source.encoded.resolve()), "column": None}
            changes[name] = source.config.model_copy(update=encoded)
    endless = config.model_copy(update=changes)
    machine = accelerator(endless, scratch)
    if machine.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
    wait_for_main(machine)
    steps = run(endless, scratch, machine)
    rounds = (progress for progress in steps if isinstance(progress, Progress))
    times = []
    for count in (WARM, TIMED):
        for _ in islice(rounds, count):
            pass
        if machine.device.type == "cuda":
            torch.cuda.synchronize(machine.device)
        times.append(time.perf_counter())
    steps.close()
    del steps, rounds
    gc.collect()  # the networks refer to themselves, and the run's own are loaded next
    speed = from_main(TIMED * config.batch / (times[1] - times[0]))  # one number of images for all
    if machine.is_main_process:
        shutil.rmtree(scratch)
        write_speed(out, speed)
    wait_for_main(machine)
    return speed
