"""The loop: for each turn of the method, for its steps: loss, backward, average over devices, clip, step.

It owns optimizers, rhythm and checkpoints, and yields progress to its caller. Every random number is a function of
(seed, purpose, image index), so a run needs no generator's state to continue, and devices share one global batch.

A step sums the gradients of its micro-batches, which are this process's share of the batch, and averages the sums over
processes once: gradient accumulation that any method's turns can alternate over. On a GPU, without
a CUDA graph, a thread reads or encodes the next micro-batches meanwhile.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, LoggerType, ProjectConfiguration
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distill.config import RunConfig
from distill.data.batches import MicroBatch, batches, micro_batch_size, prefetch
from distill.data.conditions import Conditions, Reals
from distill.errors import ConfigError, DivergedError, RunError
from distill.flow import one_step
from distill.methods.base import Turn, Velocities
from distill.models import attention, quantize
from distill.models.device import resolve_device
from distill.models.sd3 import load_transformer
from distill.models.sd3_folder import SD3Folder
from distill.models.text import TextCondition
from distill.student.cuda_graphs import CudaGraphed
from distill.training import checkpoint, optimizers
from distill.training.ema import average_into, new_share
from distill.training.metrics import MetricsLog, RoundMetrics, sample_of
from distill.training.networks import CRITIC, Networks
from distill.training.processes import COLLECTIVE_TIMEOUT, wait_for_main
from distill.training.state import TrainingProgress

MESSAGE = 1 << 26  # numbers of a gradient that processes average at once
_ENGINES = "cannot train roles in turns; launch with DDP, or FSDP with fsdp_version 2"
GRAPHED = 50_000_000  # numbers in a network's weights, from which on kernels take longer than their launches


@dataclass(frozen=True)
class Progress(TrainingProgress):
    """Where a run stands after a round of turns, for as long as its next round has not begun.

    `seconds` is the time of all rounds so far, without checkpoints and without what the caller does between rounds.
    `generate(cond, z)` is the averaged student, `average` its weights.
    Whoever looks at a run on the way adds metrics, and notes, which are sentences for people.
    """

    seconds: float
    generate: Callable[[TextCondition, Tensor], Tensor]
    average: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def accelerator_for(precision: str, out: Path, trackers: Sequence[str] = ("tensorboard",)) -> Accelerator:
    """Accelerate's view of the machine, one process or many; trackers that write files do so under `out/tensorboard`.

    Raises ConfigError for a tracker that is unknown or not installed, for an environment in which accelerate cannot
    start, and for one that asks for an engine that cannot train roles in alternation.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM", "SAGEMAKER"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(f"ACCELERATE_USE_{name} is set, and this engine {_ENGINES}; unset it")
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    for name in trackers:
        if name not in known:
            raise ConfigError(f"trackers: there is no {name!r}; there are {', '.join(known)}")
        if LoggerType(name) not in get_available_trackers():
            package = name.replace("_", "-")
            raise ConfigError(f"trackers: {name} is not installed; `pip install {package}`, or take it off the list")
    folders = ProjectConfiguration(project_dir=out, logging_dir=out / "tensorboard")
    waiting = InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)
    try:
        return Accelerator(
            mixed_precision=precision,
            log_with=list(trackers) or None,
            project_config=folders,
            kwargs_handlers=[waiting],
        )
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"accelerate does not start: {error}; check the variables of a launcher (ACCELERATE_..., FSDP_..., "
            "WORLD_SIZE, RANK, MASTER_ADDR), or unset them to train in one process"
        ) from error


def check(config: RunConfig, accelerator: Accelerator) -> None:
    """Raise ConfigError for what the configuration asks and this machine, as it was launched, cannot do."""
    resolve_device(str(accelerator.device))  # an environment variable may name a missing device
    if config.batch % accelerator.num_processes:
        world = accelerator.num_processes
        raise ConfigError(f"batch {config.batch} does not divide over {world} processes; take a multiple of {world}")
    if config.prompts.encoder_device is not None:
        try:
            resolve_device(config.prompts.encoder_device)
        except ConfigError as error:
            raise ConfigError(f"prompts.encoder_device: {error}") from None
    if config.prompts.t5 == "int8":
        quantize.check("int8", torch.bfloat16, accelerator.device, "prompts.t5")
    engine = accelerator.distributed_type
    if engine in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        engine == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise ConfigError(f"{engine.value} {_ENGINES}")
    dimensions = accelerator.parallelism_config
    if dimensions is not None and (dimensions.tp_enabled or dimensions.cp_enabled):
        raise ConfigError(f"tensor or context parallelism {_ENGINES}")
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
    if config.networks.cuda_graph is True and (against := _against_graphs(config, accelerator)):
        raise ConfigError(f"networks.cuda_graph needs {', '.join(against)}; set it to auto, or change that")


def mesh(accelerator: Accelerator) -> DeviceMesh | None:
    """The devices that a shared base is sharded over: accelerate's own mesh, else all; None without FSDP2."""
    if not accelerator.is_fsdp2:
        return None
    own: DeviceMesh | None = accelerator.torch_device_mesh
    if own is not None:
        return own[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def _against_graphs(config: RunConfig, accelerator: Accelerator) -> list[str]:
    """What a CUDA graph of a round needs, and this configuration or machine has not."""
    against = {
        "a CUDA device": accelerator.device.type != "cuda",
        "a single process without FSDP": accelerator.num_processes > 1 or accelerator.is_fsdp2,
        "one size of images": len(config.sizes) > 1,
        "networks.gradient_checkpointing false": config.networks.gradient_checkpointing,
        "optimizer.kind adam": config.optimizer.kind != "adam",
    }
    return [need for need, missing in against.items() if missing]


def train(
    config: RunConfig,
    out: Path,
    networks: Networks,
    conditions: Conditions,
    shapes: Sequence[tuple[int, int, int]],
    accelerator: Accelerator,
    reals: Reals | None = None,
    shift: float = 1.0,
) -> Iterator[Progress]:
    """Run to the budget, from the newest checkpoint in `out/checkpoints` if there is one.

    `shapes` are the latents (C, h, w) that each step draws one of, `shift` is the time shift of the teacher's
    scheduler. Raises CheckpointError for a checkpoint of another
    configuration, DivergedError for gradients that are not finite, RunError when `out` vanishes meanwhile.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    local = config.batch // world

    # 1. state
    rates = {"fake": config.optimizer.fake_lr, "student": config.optimizer.student_lr}
    weights = {role: networks.trainable(role) for role in networks.roles}
    adams = {role: optimizers.adam(weights[role].values(), config.optimizer, rates[role]) for role in networks.roles}
    average = {name: tensor.detach().clone() for name, tensor in weights["student"].items()}
    state = _State(config, out / "checkpoints", weights, average, adams)
    images, seconds = state.restore()
    if config.init_from is not None and images == 0:
        state.begin(config.init_from)
    log = MetricsLog(out, accelerator, images, config)

    null = conditions.null.to(device)
    velocities = {turn.role: _velocities(networks, turn, null, shift) for turn in config.method.turns()}
    turns = [turn for turn in config.method.turns() for _ in range(turn.steps)]
    parts = -(-local // micro_batch_size(config, local))  # micro-batches of a step
    skipped = {role: torch.zeros((), device=device) for role in networks.roles}  # steps in a row, now
    most_skipped = {role: torch.zeros((), device=device) for role in networks.roles}  # at any time of this process
    share = torch.zeros((), device=device)  # of the new weights in the average
    names: list[str] = []  # of a round's metrics
    graphed = not _against_graphs(config, accelerator) and (
        networks.size() < GRAPHED if config.networks.cuda_graph == "auto" else config.networks.cuda_graph
    )

    def take_round(coming: Iterator[MicroBatch]) -> Tensor:
        """One step for each turn; the metrics' sums (names, 2)."""
        metrics = RoundMetrics()
        for turn in turns:
            with log.seconds(turn.role):
                # 2. loss and gradient, over this process's share of the global batch
                for part in islice(coming, parts):
                    with networks.using(turn.role):
                        with accelerator.autocast():
                            loss = turn.loss(velocities[turn.role], part.batch(config.seed))
                        (loss.value * (len(part.images) / local)).backward()
                    metrics.add_loss(turn.role, loss)

                # 3. average over processes, clip, step
                tensors = list(weights[turn.role].values())
                _average_gradients(tensors, accelerator)
                norm = torch.nn.utils.clip_grad_norm_(tensors, config.optimizer.max_grad_norm)
                sound = norm.isfinite()
                optimizers.step(adams[turn.role], sound)
                adams[turn.role].zero_grad()
                skipped[turn.role].copy_(torch.where(sound, 0, skipped[turn.role] + 1))
                most_skipped[turn.role].copy_(torch.maximum(most_skipped[turn.role], skipped[turn.role]))
                metrics.add(f"gradient_norm/{turn.role}", norm)
                metrics.add(f"skipped/{turn.role}", (~sound).float())
                if not graphed:
                    check_soundness(turn.role)  # waits for the device, so that the turn's seconds are its own

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
    run_round = _graphed(take_round, parts * len(turns), log) if graphed else take_round
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
                optimizers.set_rate(optimizer, rates[role] * _rate(config, images))
            share.fill_(new_share(config.ema_half_life, after, config.batch))
            before = {role: sample_of(list(weights[role].values())) for role in weights} if logged else {}
            log.add_round(names, run_round(fed))
            if graphed and (logged or saved):
                with log.seconds("round"):  # waits for the device
                    for role in networks.roles:
                        check_soundness(role)

            # 5. report and keep
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
            save = partial(state.save, images, seconds, world)
            progress = Progress(seen, images, total, {}, save, seconds, generate, average)
            if logged:
                progress.metrics.update(log.write(images, seconds))
            if saved:
                if accelerator.is_main_process:
                    save()
                wait_for_main(accelerator)
            yield progress


def _fed(made: Iterator[MicroBatch], device: torch.device, log: MetricsLog) -> Iterator[MicroBatch]:
    """Micro-batches on the device; the time that is waited for them is logged."""
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
    """The same rounds, of so many micro-batches, as replays of one CUDA graph."""
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


def _velocities(networks: Networks, turn: Turn, null: TextCondition, shift: float) -> Velocities:
    """In its own turn a role learns; in the other's it only passes gradient on to its input."""
    fields: dict[str, Any] = {
        name: networks.velocity(name) if name == turn.role else networks.field(name)
        for name in ("student", "teacher", "fake")
    }
    if turn.critic:
        fields["critic"] = networks.critic(turn.role == "fake")
    return Velocities(**fields, null=null, shift=shift)


def _rate(config: RunConfig, images: int) -> float:
    """Share of the full rate: a linear rise over `warmup` images, a plateau, a half cosine over the last `decay`."""
    warm = min(1.0, (images + config.batch) / max(config.optimizer.warmup_images, 1))
    start = max(0, config.images - config.optimizer.decay_images)
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
    _copy(others, weights)
    try:
        yield
    finally:
        _copy(own, weights)


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds: the trainable weights and the optimizer of each role, and the averaged student."""

    config: RunConfig
    folder: Path
    weights: dict[str, dict[str, Tensor]]
    average: dict[str, Tensor]
    adams: dict[str, torch.optim.Optimizer]

    def save(self, images: int, seconds: float, processes: int) -> None:
        tensors = checkpoint.pack("average", self.average)
        for role, weights in self.weights.items():
            tensors |= checkpoint.pack(role, weights)
            tensors |= checkpoint.pack(f"{role}-optimizer", checkpoint.optimizer_tensors(self.adams[role]))
        identity = self.config.identity()
        record = {"images": images, "seconds": seconds, "processes": processes, "config": identity}
        checkpoint.save(self.folder / checkpoint.state_name(images), tensors, record)
        checkpoint.prune(self.folder, self.config.cadence.keep_checkpoints)

    def restore(self) -> tuple[int, float]:
        """Images seen by the newest checkpoint, whose state is put back, and seconds taken for them; 0 without one."""
        newest = checkpoint.latest(self.folder)
        if newest is None:
            return 0, 0.0
        tensors, record = checkpoint.load(newest)
        self.config.check_same(record["config"], newest)
        _copy(checkpoint.unpack("average", tensors), self.average)
        for role, weights in self.weights.items():
            _copy(checkpoint.unpack(role, tensors), weights)
            checkpoint.restore_optimizer(self.adams[role], checkpoint.unpack(f"{role}-optimizer", tensors))
        return int(record["images"]), float(record.get("seconds", 0))

    def begin(self, start: Path) -> None:
        """Roles take the weights of another run's newest checkpoint, or the student those of a student folder.

        Optimizers and data begin anew. Raises ConfigError when there are no weights, or they are of other networks.
        """
        if (start / "model_index.json").exists():
            loaded = load_transformer(SD3Folder.read(start)).state_dict()
            student = {name: loaded[name] for name in self.average if name in loaded}
            found = {"student": student, "average": student}
        else:
            newest = checkpoint.latest(start / "checkpoints")
            if newest is None:
                raise ConfigError(f"init_from: {start} has no checkpoint; give the folder of a run or of a student")
            tensors, _ = checkpoint.load(newest)
            found = {part: checkpoint.unpack(part, tensors) for part in ("average", *self.weights)}
        for part, own in (("average", self.average), *self.weights.items()):
            given = found.get(part, {})
            if not given and part != "student":
                continue  # a method that trained no such role
            # A critic that only one of the two runs has begins anew, or is left behind.
            critic = {name for name in given.keys() ^ own.keys() if name.startswith(CRITIC)}
            own, given = ({name: x for name, x in of.items() if name not in critic} for of in (own, given))
            if {name: tensor.shape for name, tensor in given.items()} != {name: own[name].shape for name in own}:
                raise ConfigError(
                    f"init_from: {start} has other weights for the {part}; networks and teacher must be alike"
                )
            _copy(given, own)


def _copy(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Set weights to tensors of the same names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            weights[name].copy_(tensor)
