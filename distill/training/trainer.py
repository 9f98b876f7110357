"""The training loop: for each step of each update phase: loss, backward, average over devices, clip, step.

The trainer owns optimizers and checkpoints, and yields progress to its caller. Every random number is a function of
(seed, purpose, image index), so a run resumes without generator state, and devices share one global batch.

A step sums the gradients of its micro-batches, which are this process's share of the batch, and averages the sums over
processes once. On a GPU without a CUDA graph, a thread reads or encodes the next micro-batches meanwhile.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.config import RunConfig
from distill.data.batches import MicroBatch, batches, micro_batch_size, prefetch
from distill.data.conditions import Conditions, Reals
from distill.errors import DivergedError, RunError
from distill.flow import one_step
from distill.methods.base import UpdatePhase, Velocities
from distill.models.cuda_graphs import CudaGraphed
from distill.models.text import TextCondition
from distill.training import checkpoint, optimizers
from distill.training.accelerator import graph_obstacles
from distill.training.ema import average_into, new_share
from distill.training.metrics import MetricsLog, RoundMetrics, sample_of
from distill.training.networks import Networks
from distill.training.processes import wait_for_main
from distill.training.rate_schedule import RateSchedule
from distill.training.run_checkpoint import RunCheckpoint, copy_tensors
from distill.training.state import TrainingProgress

MESSAGE = 1 << 26  # numbers of a gradient that processes average at once
GRAPHED = 50_000_000  # numbers in a network's weights, from which on kernels take longer than their launches


@dataclass(frozen=True)
class Progress(TrainingProgress):
    """The state of a run after a round; valid until the next round begins.

    `seconds` is the time of all rounds so far, without checkpoints and without what the caller does between rounds.
    `generate(cond, z)` is the averaged student, `average` its weights. A caller may add metrics and notes.
    """

    seconds: float
    generate: Callable[[TextCondition, Tensor], Tensor]
    average: dict[str, Tensor]


def train(
    config: RunConfig,
    out: Path,
    networks: Networks,
    conditions: Conditions,
    shapes: Sequence[tuple[int, int, int]],
    accelerator: Accelerator,
    reals: Reals | None = None,
    shift: float = 1.0,
    start: Callable[[], Mapping[str, Mapping[str, Tensor]]] | None = None,
) -> Iterator[Progress]:
    """Train to the budget, from the newest checkpoint in `out/checkpoints` if there is one.

    Each step draws one of the latent `shapes` (C, h, w); `shift` is the time shift of the teacher's scheduler. A new
    run takes the weights that `start()` reads for student, average and fake, or else those of the teacher. A resumed
    run first yields its checkpoint's state, as after its last round. Raises CheckpointError for a checkpoint of another
    configuration, DivergedError for gradients that are not finite, RunError if `out` disappears.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    local = config.batch // world

    # 1. state
    rates = {"fake": config.optimizer.fake_lr, "student": config.optimizer.student_lr}
    schedule = RateSchedule(config.images, config.batch, config.optimizer.warmup_images, config.optimizer.decay_images)
    weights = {role: networks.trainable(role) for role in networks.roles}
    adams = {role: optimizers.adam(weights[role].values(), config.optimizer, rates[role]) for role in networks.roles}
    average = {name: tensor.detach().clone() for name, tensor in weights["student"].items()}
    state = RunCheckpoint(config, out / "checkpoints", weights, average, adams)
    images, seconds = state.restore()
    if start is not None and images == 0:
        state.begin(start())
    log = MetricsLog(out, accelerator, images, config)

    phases = config.method.update_phases()
    steps = [phase for phase in phases for _ in range(phase.steps)]  # of a round
    parts = -(-local // micro_batch_size(config, local))  # micro-batches of a step
    skipped = {role: torch.zeros((), device=device) for role in networks.roles}  # steps in a row
    most_skipped = {role: torch.zeros((), device=device) for role in networks.roles}  # the maximum in this process
    share = torch.zeros((), device=device)  # of the new weights in the average
    names: list[str] = []  # of a round's metrics
    graphed = not graph_obstacles(config, accelerator) and (
        networks.size() < GRAPHED if config.networks.cuda_graph == "auto" else config.networks.cuda_graph
    )
    null = conditions.null.to(device)
    # A CUDA graph replays all its calls, and processes that share a sharded base must make the same ones.
    conditional = not graphed and not accelerator.is_fsdp2
    velocities = {phase.role: _velocities(networks, phase, null, shift, conditional) for phase in phases}

    def take_round(coming: Iterator[MicroBatch]) -> Tensor:
        """Take the steps of a round; return the sums and counts of metrics (names, 2)."""
        metrics = RoundMetrics()
        for phase in steps:
            with log.seconds(phase.role):
                # 2. loss and gradient, over this process's share of the global batch
                for part in islice(coming, parts):
                    with networks.using(phase.role):
                        with accelerator.autocast():
                            loss = phase.loss(velocities[phase.role], part.batch(config.seed))
                        (loss.value * (len(part.images) / local)).backward()
                    metrics.add_loss(phase.role, loss)

                # 3. average over processes, clip, step
                tensors = list(weights[phase.role].values())
                _average_gradients(tensors, accelerator)
                norm = torch.nn.utils.clip_grad_norm_(tensors, config.optimizer.max_grad_norm)
                sound = norm.isfinite()
                optimizers.step(adams[phase.role], sound)
                adams[phase.role].zero_grad()
                skipped[phase.role].copy_(torch.where(sound, 0, skipped[phase.role] + 1))
                most_skipped[phase.role].copy_(torch.maximum(most_skipped[phase.role], skipped[phase.role]))
                metrics.add(f"gradient_norm/{phase.role}", norm)
                metrics.add(f"skipped/{phase.role}", (~sound).float())
                if not graphed:
                    check_soundness(phase.role)  # waits for the device, so that the phase's seconds are its own

        # 4. average the student
        average_into(average.values(), (weights["student"][name] for name in average), share)
        names[:] = metrics.names()
        return metrics.sums()

    def check_soundness(role: str) -> None:
        in_a_row = int(most_skipped[role])
        if in_a_row > config.optimizer.max_skipped_steps:
            raise DivergedError(
                f"the {role}'s gradient was not finite {in_a_row} times in a row after {images} images; "
                f"lower optimizer.{role}_lr, or train with precision fp32; the last checkpoint is sound"
            )

    def generate(cond: TextCondition, z: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast(), _swapped(weights["student"], average):
            return one_step(velocities["student"].student, z.to(device), cond.to(device))

    total = -(-config.images // config.batch) * config.batch  # a step is never cut

    def progress_from(seen: int) -> Progress:
        save = partial(state.save, images, seconds, world)
        return Progress(seen, images, total, {}, save, seconds, generate, average)

    if images:
        yield progress_from(max(0, images - config.batch))
    run_round = _graphed(take_round, parts * len(steps), log) if graphed else take_round
    coming = batches(config, images, rank * local, local, conditions, shapes, device.type == "cuda", reals)
    # On a CPU the thread would take cores from the step itself; a graph is recorded without other threads.
    with closing(coming if device.type == "cpu" or graphed else prefetch(coming)) as made:
        fed = _fed(made, device, log)
        while images < config.images:
            started = time.perf_counter()
            after = images + config.batch
            logged, saved = (
                after >= config.images or checkpoint.crosses(images, after, every)
                for every in (config.cadence.log, config.cadence.checkpoint)
            )
            for role, optimizer in adams.items():
                optimizers.set_rate(optimizer, rates[role] * schedule.factor(images))
            share.fill_(new_share(config.ema_half_life, after, config.batch))
            before = {role: sample_of(list(weights[role].values())) for role in weights} if logged else {}
            log.add_round(names, run_round(fed))
            if graphed and (logged or saved):
                with log.seconds("round"):  # waits for the device
                    for role in networks.roles:
                        check_soundness(role)

            # 5. log and save
            if not out.is_dir():
                raise RunError(
                    f"{out} is gone; if it was moved, the same command with its new place as --out continues "
                    "from the last checkpoint in it"
                )
            seen, images = images, after
            for role, old in before.items():
                change = sample_of(list(weights[role].values())) - old
                log.add_number(f"update_ratio/{role}", float(change.norm() / old.norm()))
            seconds += time.perf_counter() - started
            progress = progress_from(seen)
            if logged:
                progress.metrics.update(log.write(images, seconds))
            if saved:
                if accelerator.is_main_process:
                    progress.save()
                wait_for_main(accelerator)
            yield progress


def _fed(made: Iterator[MicroBatch], device: torch.device, log: MetricsLog) -> Iterator[MicroBatch]:
    """Yield the micro-batches on the device, and log the time of waiting for them."""
    while True:
        with log.seconds("data"):
            part = next(made, None)
            if part is None:
                return
            part = part.to(device)
        yield part


def _graphed(
    take_round: Callable[[Iterator[MicroBatch]], Tensor], count: int, log: MetricsLog
) -> Callable[[Iterator[MicroBatch]], Tensor]:
    """The same function of `count` micro-batches, replayed as one CUDA graph."""
    forms: list[MicroBatch] = []

    def from_tensors(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return take_round(form.with_tensors(*islice(rest, len(form.tensors()))) for form in forms)

    replay = CudaGraphed(from_tensors, effects=True)

    def run_round(coming: Iterator[MicroBatch]) -> Tensor:
        forms[:] = islice(coming, count)
        with log.seconds("round"):
            return replay(*(tensor for form in forms for tensor in form.tensors()))

    return run_round


def _velocities(
    networks: Networks, phase: UpdatePhase, null: TextCondition, shift: float, conditional: bool
) -> Velocities:
    """The networks of an update phase: its role has gradient to its weights, the others to their input only."""
    fields: dict[str, Any] = {
        name: networks.velocity(name) if name == phase.role else networks.field(name)
        for name in ("student", "teacher", "fake")
    }
    if phase.critic:
        fields["critic"] = networks.critic(phase.role == "fake")
    return Velocities(**fields, null=null, shift=shift, conditional_calls=conditional)


def _average_gradients(tensors: list[Tensor], accelerator: Accelerator) -> None:
    """Average the gradients over processes, in messages of at most MESSAGE numbers."""
    if accelerator.num_processes == 1:
        return
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    while gradients:
        ends = accumulate(gradient.numel() for gradient in gradients)
        count = max(1, sum(end <= MESSAGE for end in ends))
        message, gradients = gradients[:count], gradients[count:]
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in message]), "mean")
        for gradient, part in zip(message, flat.split([g.numel() for g in message]), strict=True):
            gradient.copy_(part.view_as(gradient))


@contextmanager
def _swapped(weights: dict[str, Tensor], others: dict[str, Tensor]) -> Iterator[None]:
    """Replace the values of `weights` by those of `others` for the duration of the block."""
    own = {name: tensor.detach().clone() for name, tensor in weights.items()}
    copy_tensors(others, weights)
    try:
        yield
    finally:
        copy_tensors(own, weights)
