"""The loop: for each turn of the method, for its steps: loss, backward, average over devices, clip, step.

It owns optimizers, rhythm and checkpoints, and yields progress to its caller. Every random number is a function of
(seed, purpose, image index), so a run needs no generator's state to continue, and devices share one global batch.

A step sums the gradients of its micro-batches, which are this process's share of the batch, and averages the sums over
processes once: gradient accumulation that any method's turns can alternate over. For a GPU the next micro-batch is
read and drawn in a thread meanwhile.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    set_seed,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distill import attention, checkpoint, optimizers
from distill.batches import Conditions, Reals, ahead, batches, micro, onto
from distill.config import Run
from distill.errors import ConfigError, DivergedError, RunError
from distill.flow import one_step
from distill.log import Log
from distill.methods import Turn, Velocities
from distill.networks import Networks
from distill.text import TextCondition

PATIENCE = timedelta(days=1)  # of processes for the first, which encodes all prompts; NCCL's own ends at ten minutes
MESSAGE = 1 << 26  # numbers of a gradient that processes average at once


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a round of turns, for as long as its next round has not begun.

    `seconds` is what all rounds so far took, without checkpoints and without what the caller does between rounds.
    `generate(cond, z)` is the averaged student, `average` its weights; `save()` keeps a checkpoint off the cadence.
    Whoever looks at a run on the way adds figures, and notes, which are sentences for people.
    """

    before: int
    images: int
    seconds: float
    figures: dict[str, float]
    generate: Callable[[TextCondition, Tensor], Tensor]
    average: dict[str, Tensor]
    save: Callable[[], None]
    notes: list[str] = field(default_factory=list)

    def crosses(self, every: int) -> bool:
        """Whether a cadence of `every` images fell due in this round."""
        return self.images // every > self.before // every


def accelerator_for(precision: str, out: Path, trackers: Sequence[str] = ("tensorboard",)) -> Accelerator:
    """Accelerate's view of the machine, one process or many; trackers that write files do so under `out/tensorboard`.

    Raises ConfigError for a tracker that accelerate does not know or that is not installed.
    """
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    for name in trackers:
        if name not in known:
            raise ConfigError(f"trackers: there is no {name!r}; there are {', '.join(known)}")
        if LoggerType(name) not in get_available_trackers():
            package = name.replace("_", "-")
            raise ConfigError(f"trackers: {name} is not installed; `pip install {package}`, or take it off the list")
    folders = ProjectConfiguration(project_dir=out, logging_dir=out / "tensorboard")
    waiting = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(
        mixed_precision=precision,
        log_with=list(trackers) or None,
        project_config=folders,
        kwargs_handlers=[waiting],
    )


def check(config: Run, accelerator: Accelerator) -> None:
    """Raise ConfigError for what the configuration asks and this machine, as it was launched, cannot do."""
    if config.batch % accelerator.num_processes:
        world = accelerator.num_processes
        raise ConfigError(f"batch {config.batch} does not divide over {world} processes; take a multiple of {world}")
    engine = accelerator.distributed_type
    if engine in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        engine == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise ConfigError(f"{engine.value} cannot train roles in turns; launch with DDP, or FSDP with fsdp_version 2")
    if accelerator.is_fsdp2 and config.networks.kind == "full":
        raise ConfigError("networks.kind full trains under DDP; launch without FSDP, or take networks.kind lora")
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    compiler = os.environ.get("CXX", "g++")  # that torch asks for where there is no GPU
    if config.networks.compile and accelerator.device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"networks.compile needs a C++ compiler but there is no {compiler}; install one, or set it to false"
        )
    attention.check(config.networks.attention, dtype, accelerator.device)
    optimizers.check(config.optimizer.kind, accelerator.device)


def mesh(accelerator: Accelerator) -> DeviceMesh | None:
    """The devices that a shared base is sharded over: accelerate's own mesh, else all; None without FSDP2."""
    if not accelerator.is_fsdp2:
        return None
    own: DeviceMesh | None = accelerator.torch_device_mesh
    if own is not None:
        return own[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def train(
    config: Run,
    out: Path,
    networks: Networks,
    conditions: Conditions,
    shapes: Sequence[tuple[int, int, int]],
    accelerator: Accelerator,
    reals: Reals | None = None,
) -> Iterator[Progress]:
    """Run to the budget, from the newest checkpoint in `out/checkpoints` if there is one.

    `shapes` are the latents (C, h, w) that each step draws one of. Raises CheckpointError for a checkpoint of another
    configuration, DivergedError for a number that is not finite, RunError when `out` vanishes meanwhile.
    """
    set_seed(config.seed)
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    local = config.batch // world

    # 1. state
    rates = {"fake": config.optimizer.fake_rate, "student": config.optimizer.student_rate}
    weights = {role: networks.trainable(role) for role in networks.roles}
    adams = {role: optimizers.adam(weights[role].values(), config.optimizer, rates[role]) for role in networks.roles}
    average = {name: tensor.detach().clone() for name, tensor in weights["student"].items()}
    images, seconds = _restore(out / "checkpoints", config, weights, average, adams)
    if config.start is not None and images == 0:
        _begin(config.start, weights, average)
    log = Log(out, accelerator, images, config)

    null = conditions.null.to(device)
    asked = {turn.role: _asked(networks, turn, null) for turn in config.method.turns()}
    skipped = dict.fromkeys(networks.roles, 0)  # steps in a row whose gradient was not finite
    pinned = device.type == "cuda"
    turns = [turn for turn in config.method.turns() for _ in range(turn.steps)]

    def generate(cond: TextCondition, z: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast(), _swapped(weights["student"], average):
            return one_step(asked["student"].student, z.to(device), cond.to(device))

    coming = batches(config, images, rank * local, local, conditions, shapes, pinned, reals)
    # On a CPU the thread would take the cores that the step itself runs on.
    with closing(coming if device.type == "cpu" else ahead(coming)) as made:
        while images < config.images:
            started = time.perf_counter()
            scale = _rate(config, images)
            after = images + config.batch
            logged = after >= config.images or after // config.cadence.log > images // config.cadence.log
            for turn in turns:
                # 2. loss and gradient, over this process's share of the global batch
                for _ in range(0, local, micro(config, local)):
                    with log.seconds("data"):
                        batch = onto(next(made), device)
                    with log.seconds(turn.role), networks.using(turn.role):
                        with accelerator.autocast():
                            loss = turn.loss(asked[turn.role], batch)
                        (loss.value * (len(batch.z) / local)).backward()
                        log.add_loss(turn.role, loss)

                # 3. average over processes, clip, step
                with log.seconds(turn.role):
                    tensors = list(weights[turn.role].values())
                    _average_gradients(tensors, accelerator)
                    norm = float(torch.nn.utils.clip_grad_norm_(tensors, config.optimizer.clip))
                    sound = math.isfinite(norm)
                    skipped[turn.role] = 0 if sound else skipped[turn.role] + 1
                    if skipped[turn.role] > config.optimizer.skips:
                        raise DivergedError(
                            f"the {turn.role}'s gradient is {norm} after {images} images, {skipped[turn.role]} "
                            f"times in a row; lower optimizer.{turn.role}_rate, or train with precision fp32; "
                            "the last checkpoint is sound"
                        )
                    adams[turn.role].param_groups[0]["lr"] = rates[turn.role] * scale
                    if sound:
                        with log.update_ratio(turn.role, tensors) if logged else nullcontext():
                            adams[turn.role].step()
                        log.add(f"gradient_norm/{turn.role}", norm)
                    adams[turn.role].zero_grad()
                    log.add(f"skipped/{turn.role}", float(not sound))

            # 4. average the student
            # The first images count for more: an average that starts at the teacher should not stay there.
            keep = min(config.ema, (1 + images / config.batch) / (10 + images / config.batch))
            for name, tensor in average.items():
                tensor.lerp_(weights["student"][name].detach(), 1 - keep)

            # 5. report and keep
            if not out.is_dir():
                raise RunError(
                    f"{out} is gone; if it was moved, the same command with its new place as --out continues "
                    "from the last checkpoint in it"
                )
            before, images = images, after
            seconds += time.perf_counter() - started
            save = partial(_save, out / "checkpoints", config, weights, average, adams, images, seconds, world)
            progress = Progress(before, images, seconds, {}, generate, average, save)
            if logged:
                progress.figures.update(log.write(images))
            if progress.crosses(config.cadence.checkpoint) or images >= config.images:
                if accelerator.is_main_process:
                    save()
                accelerator.wait_for_everyone()
            yield progress


def _asked(networks: Networks, turn: Turn, null: TextCondition) -> Velocities:
    """In its own turn a role learns; in the other's it only passes gradient on to its input."""
    fields = {
        name: networks.velocity(name) if name == turn.role else networks.field(name)
        for name in ("student", "teacher", "fake")
    }
    if turn.critic:
        fields["critic"] = networks.critic(turn.role == "fake")
    return Velocities(**fields, null=null)


def _rate(config: Run, images: int) -> float:
    """Share of the full rate: a linear rise, a plateau, a half cosine to zero."""
    warm = min(1.0, (images + config.batch) / max(config.optimizer.warmup, 1))
    start = config.images * (1 - config.optimizer.decay)
    if images <= start:
        return warm
    return warm * (0.5 + 0.5 * math.cos(math.pi * (images - start) / (config.images - start)))


def _average_gradients(tensors: list[Tensor], accelerator: Accelerator) -> None:
    """Mean over processes, in few messages; any number of forwards before it stays right."""
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
    """`weights` hold `others` for a while."""
    own = {name: tensor.detach().clone() for name, tensor in weights.items()}
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(others[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(own[name])


def _save(
    folder: Path,
    config: Run,
    weights: dict[str, dict[str, Tensor]],
    average: dict[str, Tensor],
    adams: dict[str, torch.optim.Optimizer],
    images: int,
    seconds: float,
    processes: int,
) -> None:
    tensors = checkpoint.pack("average", average)
    for role in weights:
        tensors |= checkpoint.pack(role, weights[role])
        tensors |= checkpoint.pack(f"{role}-optimizer", checkpoint.optimizer_tensors(adams[role]))
    record = {"images": images, "seconds": seconds, "processes": processes, "config": config.identity()}
    checkpoint.save(folder / checkpoint.state_name(images), tensors, record)
    checkpoint.prune(folder, config.cadence.keep)


def _restore(
    folder: Path,
    config: Run,
    weights: dict[str, dict[str, Tensor]],
    average: dict[str, Tensor],
    adams: dict[str, torch.optim.Optimizer],
) -> tuple[int, float]:
    """Images seen by the newest checkpoint, whose state is put back, and seconds taken for them; 0 without one."""
    newest = checkpoint.latest(folder)
    if newest is None:
        return 0, 0.0
    tensors, record = checkpoint.load(newest)
    config.check_same(record["config"], newest)
    with torch.no_grad():
        for name, tensor in checkpoint.unpack("average", tensors).items():
            average[name].copy_(tensor)
        for role in weights:
            for name, tensor in checkpoint.unpack(role, tensors).items():
                weights[role][name].copy_(tensor)
    for role in weights:
        checkpoint.restore_optimizer(adams[role], checkpoint.unpack(f"{role}-optimizer", tensors))
    return int(record["images"]), float(record.get("seconds", 0))


def _begin(run: Path, weights: dict[str, dict[str, Tensor]], average: dict[str, Tensor]) -> None:
    """Roles take the weights that another run's newest checkpoint has for them; optimizers and data start anew.

    Raises ConfigError when there is none, or it is of other networks.
    """
    newest = checkpoint.latest(run / "checkpoints")
    if newest is None:
        raise ConfigError(f"start: {run} has no checkpoint; give the folder of a run")
    tensors, _ = checkpoint.load(newest)
    for part, own in (("average", average), *weights.items()):
        given = checkpoint.unpack(part, tensors)
        if not given and part != "student":
            continue  # a method that trained no such role
        if {name: tensor.shape for name, tensor in given.items()} != {name: own[name].shape for name in own}:
            raise ConfigError(f"start: {newest} has other weights for the {part}; networks and teacher must be alike")
        with torch.no_grad():
            for name, tensor in given.items():
                own[name].copy_(tensor)
