"""Starts and checks accelerate for a run: processes, precision, trackers, and what this machine supports."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, LoggerType, ProjectConfiguration
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distill.config import RunConfig
from distill.errors import ConfigError
from distill.models import attention, quantize
from distill.models.device import resolve_device
from distill.training import optimizers
from distill.training.processes import COLLECTIVE_TIMEOUT

_ENGINES = "cannot train two networks alternately; launch with DDP, or FSDP with fsdp_version 2"


def accelerator_for(precision: str, out: Path, trackers: Sequence[str] = ("tensorboard",)) -> Accelerator:
    """Start accelerate for one process or many; trackers that write files do so under `out/tensorboard`.

    Raises ConfigError for a tracker that is unknown or not installed, for an environment in which accelerate cannot
    start, and for an engine that cannot train two networks alternately.
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
            cpu=not torch.accelerator.is_available(),  # without this, processes on CPUs do not find each other
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
    """Raise ConfigError for a setting that this machine, as it was launched, does not support."""
    check_processes(accelerator)
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
    compiler = os.environ.get("CXX", "g++")  # that torch asks for where there is no GPU
    if config.networks.compile is True and accelerator.device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"networks.compile needs a C++ compiler but there is no {compiler}; install one, or set it to false"
        )
    attention.check(config.networks.attention, network_dtype(accelerator), accelerator.device)
    optimizers.check(config.optimizer.kind, accelerator.device)
    if config.networks.cuda_graph is True and (against := graph_obstacles(config, accelerator)):
        raise ConfigError(f"networks.cuda_graph needs {', '.join(against)}; set it to auto, or change that")


def network_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision of the networks."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def check_processes(accelerator: Accelerator) -> None:
    """Raise ConfigError if the launcher was asked for several processes, but this one would run alone."""
    # Accelerate's launcher always sets the first variable, and the second one if it was asked for several processes.
    # torch's launcher, which it starts them with, also sets WORLD_SIZE.
    asked = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_ADDR" in os.environ
    several = os.environ["WORLD_SIZE"] != "1" if "WORLD_SIZE" in os.environ else asked
    if several and accelerator.num_processes == 1:
        raise ConfigError(
            "the launcher was asked for several processes, but only one would run; `accelerate launch` starts several "
            "on as many GPUs only; on CPUs use `ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m distill.cli run "
            "...`; for one process give `--num_processes 1` and unset MASTER_ADDR"
        )


def mesh(accelerator: Accelerator) -> DeviceMesh | None:
    """The devices over which a shared base is sharded: accelerate's own mesh, else all; None without FSDP2."""
    if not accelerator.is_fsdp2:
        return None
    own: DeviceMesh | None = accelerator.torch_device_mesh
    if own is not None:
        return own[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def graph_obstacles(config: RunConfig, accelerator: Accelerator) -> list[str]:
    """The requirements of a CUDA graph of a round that this configuration or machine does not meet."""
    against = {
        "a CUDA device": accelerator.device.type != "cuda",
        "a single process without FSDP": accelerator.num_processes > 1 or accelerator.is_fsdp2,
        "one size of images": len(config.sizes) > 1,
        "networks.gradient_checkpointing false": config.networks.gradient_checkpointing,
        "optimizer.kind adam": config.optimizer.kind != "adam",
    }
    return [need for need, missing in against.items() if missing]
