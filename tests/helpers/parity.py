"""Gradients of one base with adapters, computed by one process or by two.

As a script it starts two processes: `parity.py TEACHER OUT` writes to OUT the averaged gradients of each form, two runs
of the trainer, a whole run, and one that is stopped.
"""

import os
import signal
import socket
import sys
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path

import torch
import typer
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import start_processes

from distill import run as runs
from distill.cli.run import run_with_bars
from distill.config import Lora, RunConfig, load_config
from distill.errors import ConfigError
from distill.methods.base import ROLES, TrainingBatch, Velocities
from distill.methods.fgm import FGMConfig
from distill.methods.policies import Guidance
from distill.models.sd3_folder import SD3Folder
from distill.models.text import TextCondition
from distill.philox import Draw
from distill.training import trainer
from distill.training.accelerator import check
from distill.training.evaluation import EvaluationCallback
from distill.training.networks import SharedBase, build
from distill.training.preparation import prepare
from distill.training.processes import wait_for_main

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
METHOD = FGMConfig(guidance=Guidance(scale=3.0, guide_fake=True, skip_layers=(0,), skip_interval=(0, 1)))
IMAGES = 4


class Prompts:
    """Conditions of the tiny teacher's shape."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        made = (torch.randn(8, *shape, generator=generator) for shape in ((8, 48), (40,)))
        self._all = TextCondition(*made)
        self.null = self._all[0]

    def __len__(self) -> int:
        return 7

    def rows(self, indices):
        return self._all[torch.tensor(list(indices)) + 1]

    def shuffle(self, generator):
        return torch.randperm(len(self), generator=generator)


def shared(teacher: Path, mesh=None, **kind) -> SharedBase:
    """A base with different adapters that are not zero, as new ones are."""
    torch.manual_seed(0)
    networks = build(SD3Folder.read(teacher), Lora(rank=4, alpha=8, **kind), torch.float32, CPU, mesh=mesh)
    for role in ROLES:
        for tensor in networks.trainable(role).values():
            tensor.data += 0.05 * torch.randn(tensor.shape)
    return networks


def asked(networks, role: str) -> Velocities:
    """Return the velocities that the trainer passes to a loss in an update phase of `role`."""
    fields = {
        name: networks.velocity(name) if name == role else networks.field(name)
        for name in ("student", "teacher", "fake")
    }
    return Velocities(**fields, null=Prompts().null)


def gradients(nets: Velocities, trainable, role: str, images=range(IMAGES)) -> dict[str, torch.Tensor]:
    """Return the gradients of the FGM loss of an update phase of `role` over some images."""
    phase = {phase.role: phase for phase in METHOD.update_phases()}[role]
    draw = Draw(0, role, images)
    phase.loss(nets, TrainingBatch(draw.normal(SHAPE), Prompts().rows(images), draw)).value.backward()
    return {name: tensor.grad for name, tensor in trainable.items()}


def run(**more) -> RunConfig:
    """The configuration of four rounds, with a checkpoint after every second one."""
    sets = {
        "batch": IMAGES,
        "images": 4 * IMAGES,
        "cadence.checkpoint": 2 * IMAGES,
        "optimizer.warmup_images": 0,
        **more,
    }
    return load_config("scenes-debug", [f"{key}={value}" for key, value in sets.items()])


def whole(teacher: Path, prompts: Path, *more: str) -> RunConfig:
    """The configuration of a complete run of full copies, with encoded prompts, samples and an export."""
    sets = (f"teacher={teacher}", f"prompts.source={prompts}", "batch=8", "images=96", "optimizer.warmup_images=0")
    return load_config("scenes-debug", [*sets, "precision=fp32", "cadence.log=8", "cadence.checkpoint=96", *more])


class Sharding(Accelerator):
    """Says that the base is sharded, as accelerate does on GPUs alone."""

    is_fsdp2 = True


def sample_sharded(teacher: Path, out: Path, progress: trainer.Progress) -> int:
    """Save the grid of a run's end, which both processes generate; return how many encoded prompts this one holds."""
    config, machine = run(teacher=teacher), Sharding(cpu=True)
    if machine.is_main_process:
        prepare(config, out, {})
    machine.wait_for_everyone()
    callback = EvaluationCallback(config, out, SD3Folder.read(teacher), ["a red circle", "red"], None, machine)
    callback(progress)
    return 0 if callback._conditions is None else len(callback._conditions._rows)


def stop(teacher: Path, out: Path, rank: int) -> int:
    """Run the command, send SIGTERM to the second process, and return the exit status."""
    original = runs.run

    def signaled(*arguments):
        for progress in original(*arguments):
            if rank == 1 and isinstance(progress, trainer.Progress):
                signal.raise_signal(signal.SIGTERM)
            yield progress

    runs.run = signaled
    try:
        run_with_bars(whole(teacher, out / "prompts.txt", "evaluation.evaluator=none"), out / "stopped", "a run")
    except typer.Exit as ended:
        return ended.exit_code
    return 0


def main(teacher: Path, out: Path) -> None:
    """Run one of the two processes."""
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    mesh = init_device_mesh("cpu", (world,))
    half = range(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    for form, sharded in (("whole", None), ("sharded", mesh)):
        for checkpointing in (False, True):
            networks = shared(teacher, sharded, gradient_checkpointing=checkpointing)
            for role in ROLES:
                with networks.using(role):
                    found = gradients(asked(networks, role), networks.trainable(role), role, half)
                trainer._average_gradients(list(networks.trainable(role).values()), accelerator)
                if rank == 0:
                    save_file(found, out / f"{form}-{checkpointing}-{role}.safetensors")
                for tensor in networks.trainable(role).values():
                    tensor.grad = None
    held = sum(getattr(tensor, "to_local", lambda t=tensor: t)().numel() for tensor in networks._base.parameters())
    (out / f"held-{rank}").write_text(str(held))
    if rank == 0:
        store = torch.distributed.distributed_c10d._get_default_store()
        store.wait(["distill/calls/1"])  # the other process waits already
        (out / "main").write_text("done")
    wait_for_main(accelerator)
    (out / f"waited-{rank}").write_text((out / "main").read_text())
    try:
        check(run(batch=3), accelerator)
    except ConfigError as error:
        (out / "refused").write_text(str(error))

    for form, sharded, rounds in (("whole", None, 2), ("sharded", mesh, 4)):
        networks = shared(teacher, sharded)
        steps = trainer.train(run(), out / form, networks, Prompts(), [SHAPE], accelerator)
        for progress in islice(steps, rounds):
            progress.generate(Prompts().null, torch.zeros(1, *SHAPE))
    (out / f"prompts-{rank}").write_text(str(sample_sharded(teacher, out / "sharded", progress)))
    config = whole(teacher, out / "prompts.txt", "prompts.encoding=online")  # each process of its own rows only
    list(runs.run(config, out / "full", accelerator))
    with (out / f"said-{rank}").open("w") as file, redirect_stdout(file):
        status = stop(teacher, out, rank)  # which ends the training of all
    (out / f"status-{rank}").write_text(str(status))


def expected(teacher, role):
    """Return the gradients of three separate models, one for each role."""
    a, b, c = (shared(teacher) for _ in range(3))
    nets = Velocities(c.velocity("student"), a.velocity("teacher"), b.velocity("fake"), Prompts().null)
    return gradients(nets, {"fake": b, "student": c}[role].trainable(role), role)


def assert_same(found, gradients):
    assert found.keys() == gradients.keys()
    assert len(found) > 20
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def process(rank: int, port: int, teacher: Path, out: Path) -> None:
    """Run as a process of a launcher, with the variables that it sets."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
    main(teacher, out)


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    # Forks of one process, which has imported the libraries for both.
    start_processes(process, (number, *map(Path, sys.argv[1:])), nprocs=2, start_method="fork")
