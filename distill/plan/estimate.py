"""Memory and arithmetic of a distillation, from configuration files alone.

The real networks run the network calls of the real method, forward and backward, on tensors without data, and every
live storage is counted. Memory is in bytes, arithmetic in FLOP (a multiply-add is two). A plan leaves out the rounding
of the GPU's allocator, library workspaces and the CUDA context; the caller reserves memory for them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.forward_ad import unpack_dual

from distill.config import Full, Lora, RunConfig, load_config
from distill.data.shard_reader import RESIDENT_BYTES
from distill.errors import ConfigError
from distill.flow import derivative, one_step
from distill.methods.base import NetworkVelocity, Real, TrainingBatch, Turn, Velocities, Velocity
from distill.models.geometry import Geometry
from distill.models.sd3 import decode_in_parts
from distill.models.text import TextCondition
from distill.philox import Draw
from distill.plan.meter import Meter, without_data
from distill.training.evaluation import GRID
from distill.training.networks import ROLES, FullCopies, Networks, SharedBase

GIB = 2**30
# Share of the peak in a training step. Eager: measured on an H200, 1.53 images/s of 168.5 TFLOP, a LoRA step of
# SD3-medium's geometry at 1024 px, batch 4, with gradient checkpointing. Compiled blocks: an estimate, not measured.
UTILIZATION = {"eager": 0.26, "compiled": 0.35}
MATRIX_SHARE = 0.75  # of the peak, by a large matrix product on that H200: 741 TFLOP/s

SHIFT = 3.0  # of the schedulers of SD3 models; it decides at how many sampling steps layers are skipped
_STEP_PARTS = ("activations", "peak", "flop")  # of a StepCost
_QUANTIZED, _BLOCK = 4096, 256  # elements of the smallest tensor that bitsandbytes quantizes, and per scale


@dataclass(frozen=True)
class StepCost:
    """Cost of one optimizer step: bytes of the activations kept for backward, bytes at the peak, and FLOP."""

    activations: int
    peak: int
    flop: int


@dataclass(frozen=True)
class Plan:
    """Bytes by part and by stage of a run, and FLOP per image.

    `resident` memory is held throughout training. `stages` are totals, each the peak of one stage. `activations` and
    `temporary` are those of the heaviest turn, beyond resident memory; `temporary` includes gradients.
    """

    parameters: int  # of the transformer
    trainable: int  # parameters of one role
    resident: dict[str, int]
    gradients: int
    activations: int
    temporary: int
    stages: dict[str, int]
    flop_per_image: float
    optimizer_states: dict[str, int]  # by kind of optimizer

    @property
    def peak(self) -> int:
        """Bytes at the peak of the run."""
        return max(self.stages.values())

    def parts(self) -> dict[str, int]:
        """Bytes of resident memory, and of the heaviest turn beyond it."""
        return {
            **self.resident,
            "gradients, when the turn ends": self.gradients,
            "activations kept for backward": self.activations,
            "peak temporary, gradients within": self.temporary,
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with units in their names."""
        return {
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "parts_bytes": self.parts(),
            "stages_bytes": self.stages,
            "peak_bytes": self.peak,
            "flop_per_image": self.flop_per_image,
        }


@dataclass(frozen=True)
class PlanInput:
    """What a plan depends on: `batch` images of `size` x `size` pixels in a forward pass (a run's `micro_batch`)."""

    geometry: Geometry
    kind: Full | Lora
    dtype: torch.dtype
    batch: int
    size: int
    method: Any
    optimizer: Literal["adam", "adam-8bit"] = "adam"
    online: bool = False  # whether prompts are encoded during training

    @property
    def prompt_bytes(self) -> int:
        """Bytes of an encoded prompt."""
        config = self.geometry.transformer
        numbers = self.geometry.tokens * config["joint_attention_dim"] + config["pooled_projection_dim"]
        return int(self.dtype.itemsize * numbers)

    def plan(self) -> Plan:
        """Compute the cost; takes seconds and little memory. Raises SizeError."""
        self.geometry.check_size(self.size)
        counts, turns = self._counts_of_all_blocks(), self.method.turns()
        roles = sorted({turn.role for turn in turns})
        own = {role: counts[f"{role} weights"] for role in roles}
        states = {kind: counts[f"{kind} states"] for kind in ("adam", "adam-8bit")}
        costs = {role: StepCost(*(counts[f"{role} {part}"] for part in _STEP_PARTS)) for role in roles}
        resident = {
            "base weights": counts["weights"] - sum(own.values()),
            "student weights": own["student"],
            "fake weights": own.get("fake", 0),  # with its critic
            "averaged student": own["student"],
            "optimizer states": states[self.optimizer],
            "autoencoder for grids": counts["autoencoder"],
            "text encoders": self.dtype.itemsize * self.geometry.text_parameters if self.online else 0,
        }
        always = sum(resident.values())
        heaviest = max(costs.values(), key=lambda cost: cost.peak)
        stages = {
            # The text encoders of the grids' prompts are unloaded before the networks are loaded.
            "start": counts["autoencoder"] + self.dtype.itemsize * self.geometry.text_parameters,
            **{f"{role}'s turn": always + cost.peak for role, cost in costs.items()},
            "optimizer step": always + max(own.values()),  # gradients; Adam works in place
            # The student's own weights are kept while its average runs.
            "sample grid": always + own["student"] + counts["grid"],
        }
        flop = sum(turn.steps * costs[turn.role].flop for turn in turns)
        return Plan(
            parameters=counts["parameters"],
            trainable=counts["trainable"],
            resident=resident,
            gradients=max(own.values()),
            activations=heaviest.activations,
            temporary=heaviest.peak - heaviest.activations,
            stages=stages,
            flop_per_image=flop / self.batch,
            optimizer_states=states,
        )

    def _counts_of_all_blocks(self) -> dict[str, int]:
        """Count bytes and FLOP by name, in deep models by those of a few blocks.

        There are two kinds of blocks, with two attentions and with one. Each further block of a kind adds the same, and
        so does each that skip-layer guidance leaves out; one or two of each and one more tell what all of them cost.
        In the backward pass, activations are freed block by block while gradients are made, so the peak is at one of
        its ends and grows by what grows more. It may be a block's temporary memory too high, never too low.
        """
        config = self.geometry.transformer
        layers, dual = config["num_layers"], set(config.get("dual_attention_layers") or ())
        totals = (len(dual), layers - len(dual))
        least = (1, 1) if dual else (0, 2)  # the last block is a simpler one
        if layers <= sum(least) + 1 or not totals[1]:
            return self._counts(self.geometry)
        skipped = self.method.guidance.skip_layers
        base = self._counts(self.geometry.with_blocks(*least), skip=())
        counts = dict(base)
        for kind in (0, 1):
            geometry = self.geometry.with_blocks(least[0] + (kind == 0), least[1] + (kind == 1))
            left_out = sum((layer in dual) == (kind == 0) for layer in skipped)
            if further := totals[kind] - least[kind]:
                more = self._counts(geometry, skip=())
                less = self._counts(geometry, skip=(1,)) if left_out else more  # the second block is of this kind
                for name in base:
                    counts[name] += further * (more[name] - base[name]) + left_out * (less[name] - more[name])
        for role in {turn.role for turn in self.method.turns()}:
            grown = (counts[f"{role} {part}"] - base[f"{role} {part}"] for part in ("activations", "weights"))
            counts[f"{role} peak"] = base[f"{role} peak"] + max(grown)
        return counts

    def _counts(self, geometry: Geometry, skip: tuple[int, ...] | None = None) -> dict[str, int]:
        """Count bytes and FLOP by name for the blocks of a geometry, by running the networks without data.

        `skip` replaces the blocks that calls with skip-layer guidance leave out.
        """
        dtype = self.dtype
        # Compiled code cannot run on tensors without data; its fused operations keep no more memory than these.
        kind = self.kind.model_copy(update={"compile": False})
        turns = self.method.turns()
        calls = {turn.role: network_calls(turn) for turn in turns}
        if skip is not None:
            calls = {
                role: [replace(call, skip_layers=skip) if call.skip_layers else call for call in called]
                for role, called in calls.items()
            }
        two_times, critic = any(turn.two_times for turn in turns), any(turn.critic for turn in turns)
        networks = build(geometry, kind, dtype, tuple(sorted(calls)), two_times=two_times, critic=critic)
        models = networks.modules()
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(geometry.vae).eval().requires_grad_(False)
        trainable = {role: list(networks.trainable(role).values()) for role in networks.roles}
        trained = [tensor for tensors in trainable.values() for tensor in tensors]
        counts = {
            "parameters": geometry.parameters,
            "trainable": sum(tensor.numel() for tensor in trainable["student"]),
            "weights": sum(map(_nbytes, models)),
            "autoencoder": _nbytes(vae),
            "adam states": 2 * sum(tensor.nbytes for tensor in trained),  # two moments, without the step counts
            "adam-8bit states": sum(map(_adam_8bit_bytes, trained)),
            **{f"{role} weights": sum(tensor.nbytes for tensor in tensors) for role, tensors in trainable.items()},
        }
        with FakeTensorMode():
            for model in [*models, vae]:
                without_data(model)
            for role in calls:
                z, cond = _inputs(geometry, self.batch, self.size)
                cost = simulate_step(networks, role, calls[role], z, cond, dtype)
                counts |= {f"{role} {part}": getattr(cost, part) for part in _STEP_PARTS}
                for tensor in networks.trainable(role).values():
                    tensor.grad = None

            z, cond = _inputs(geometry, GRID, self.size)
            with Meter() as meter, torch.no_grad():
                with _autocast(dtype):
                    x_0 = one_step(networks.velocity("student"), z, cond)
                decode_in_parts(vae, x_0)
            counts["grid"] = meter.peak + sum(tensor.nbytes for tensor in (z, cond.embeds, cond.pooled))
        return counts


def plan_input(
    geometry: Geometry,
    mode: str,
    rank: int,
    gradient_checkpointing: bool,
    dtype: str,
    batch: int,
    size: int,
    method: str = "fgm",
    optimizer: Literal["adam", "adam-8bit"] = "adam",
    prompts: int = 0,
    overrides: Sequence[str] = (),
) -> PlanInput:
    """Build the input from the command's options, with the settings of the model's own preset, or of SD3-medium's.

    `overrides` are settings of the method, as method.key=value. Raises ConfigError, also for an override of anything
    else.
    """
    for override in overrides:
        if not override.startswith("method."):
            raise ConfigError(f"--set {override}: here only method.* can be set; the rest are options of this command")
    preset = geometry.published or "sd3-medium"
    chosen = load_config(f"{preset}-lora", [f"method.name={method}", *overrides]).method
    chosen.guidance.check_layers(geometry.transformer["num_layers"])
    kind = Lora(rank=rank) if mode == "lora" else Full()
    kind = kind.model_copy(update={"gradient_checkpointing": gradient_checkpointing})
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    made = PlanInput(geometry, kind, precision, batch, size, chosen, optimizer)
    in_bf16 = prompts * made.prompt_bytes * torch.bfloat16.itemsize // precision.itemsize
    return replace(made, online=in_bf16 > RESIDENT_BYTES)


def run_input(geometry: Geometry, config: RunConfig, batch: int | None = None, size: int | None = None) -> PlanInput:
    """Build the input of a run's configuration. The batch is `micro_batch`, the size the largest of `sizes`.

    `size` is the side of a square; another shape counts as the square of its area. Raises ConfigError for blocks that
    the model lacks.
    """
    config.method.guidance.check_layers(geometry.transformer["num_layers"])
    if size is None and config.sizes:
        unit = geometry.pixels_per_latent * int(geometry.transformer["patch_size"])
        size = unit * math.ceil(math.sqrt(max(width * height for width, height in config.sizes)) / unit)
    if config.prompts.max_sequence_length is not None:
        geometry = geometry.with_text(geometry.clip_tokens, config.prompts.max_sequence_length)
    precision = torch.float32 if config.precision == "fp32" else torch.bfloat16
    made = PlanInput(
        geometry,
        config.networks,
        precision,
        batch or config.micro_batch or config.batch,
        size or geometry.image_size,
        config.method,
        config.optimizer.kind,
    )
    encoded = config.prompts.max_count * made.prompt_bytes * torch.bfloat16.itemsize // precision.itemsize
    encoding = config.prompts.encoding
    return replace(made, online=encoding == "online" or (encoding == "auto" and encoded > RESIDENT_BYTES))


def changes_that_fit(made: PlanInput, plan: Plan, available: int) -> list[str]:
    """List options with which the peak is at most `available` bytes: single ones, or all together if none is enough.

    Empty if all together are not enough.
    """
    kind = made.kind
    found = []
    if not kind.gradient_checkpointing:
        checkpointed = replace(made, kind=kind.model_copy(update={"gradient_checkpointing": True}))
        if checkpointed.plan().peak <= available:
            found.append("--gradient-checkpointing")
    # Optimizer states are held in every stage but the start, before the networks are loaded.
    saved = plan.optimizer_states[made.optimizer] - plan.optimizer_states["adam-8bit"]
    if saved and max(plan.stages["start"], plan.peak - saved) <= available:
        found.append("--optimizer adam-8bit")
    # Without encoding during training there are no text encoders beside the networks.
    encoders = plan.resident["text encoders"]
    if encoders and max(plan.stages["start"], plan.peak - encoders) <= available:
        found.append("prompts.encoding=cached")
    if isinstance(kind, Full):
        lora = Lora(gradient_checkpointing=kind.gradient_checkpointing)
        if replace(made, kind=lora).plan().peak <= available:
            found.append(f"--mode lora --rank {lora.rank}")
    if made.batch > 1:
        least = replace(made, batch=1).plan().peak
        if least <= available:
            # The peak is convex in the batch (a maximum of linear functions), so the chord overestimates it.
            share = (available - least) / (plan.peak - least)
            found.append(f"--batch {1 + int(share * (made.batch - 1))}")
    if not found and plan.stages["start"] <= available:
        least_kind = (kind if isinstance(kind, Lora) else Lora()).model_copy(update={"gradient_checkpointing": True})
        smallest = replace(made, kind=least_kind, optimizer="adam-8bit", batch=1)
        if smallest.plan().peak <= available:
            mode = f"--mode lora --rank {least_kind.rank} " if isinstance(kind, Full) else ""
            found.append(f"{mode}--gradient-checkpointing --optimizer adam-8bit --batch 1")
    return found


def build(
    geometry: Geometry,
    kind: Full | Lora,
    dtype: torch.dtype,
    roles: tuple[str, ...] = ROLES,
    device: str = "meta",
    two_times: bool = False,
    critic: bool = False,
) -> Networks:
    """Build a run's networks as `networks.build` does, without loading weights."""
    with torch.device(device):
        model = SD3Transformer2DModel.from_config(geometry.transformer).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                # Autocast on CUDA normalizes in fp32. The CPU's rules, which apply to tensors without data, do not.
                module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
        if isinstance(kind, Lora):
            return SharedBase(model.to(dtype), kind, roles, two_times, critic)
        return FullCopies(model, kind, dtype, roles, two_times, critic)


@dataclass(frozen=True)
class NetworkCall:
    """A call by a loss, with `rows` batch rows per image, without the blocks `skip_layers`.

    Is there gradient through it, or a directional derivative?
    """

    role: str
    rows: int
    backward: bool
    forward_mode: bool
    skip_layers: tuple[int, ...] = ()


def network_calls(turn: Turn) -> list[NetworkCall]:
    """List the network calls of a turn's loss in order, by running it."""
    calls = []

    def recorder(role: str) -> NetworkVelocity:
        def record(x_t: Tensor, t: Tensor, cond: TextCondition, skip_layers: Sequence[int] = ()) -> Tensor:
            dual = any(unpack_dual(x).tangent is not None for x in (x_t, t))  # type: ignore[no-untyped-call]
            calls.append(NetworkCall(role, len(x_t), torch.is_grad_enabled(), dual, tuple(skip_layers)))
            return x_t

        return record

    cond = TextCondition(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    nets = Velocities(recorder("student"), recorder("teacher"), recorder("fake"), cond, recorder("critic"), SHIFT)
    x = torch.zeros(1, 1, 2, 2)
    turn.loss(nets, TrainingBatch(x, cond, Draw(0, "plan", range(1)), Real(x, cond)))
    return calls


def simulate_step(
    networks: Networks, role: str, calls: list[NetworkCall], z: Tensor, cond: TextCondition, dtype: torch.dtype
) -> StepCost:
    """Run forward and backward of a step of `role` as the trainer does, from noise `z` (B, C, h, w).

    The network calls are the loss's own; its arithmetic on latents between them is replaced by a square.
    """
    with Meter() as meter, networks.using(role):
        with _autocast(dtype):
            t = torch.ones(len(z))
            x, loss = z, torch.zeros(())
            for call, repeated in groupby(calls):
                count, before = len(list(repeated)), meter.flop
                if call.role == "critic":
                    field: Callable[..., Tensor] = networks.critic(role == "fake")
                else:
                    field = networks.velocity(call.role) if call.role == role else networks.field(call.role)
                # Calls that keep no activations cost the same each time, so a sampler's steps are run once.
                runs = count if call.backward else 1
                for _ in range(runs):
                    rows = torch.cat([x] * call.rows), torch.cat([t] * call.rows), TextCondition.cat([cond] * call.rows)
                    with torch.set_grad_enabled(call.backward):
                        skipped = (call.skip_layers,) if call.skip_layers else ()
                        out = _forward_mode(field, *rows) if call.forward_mode else field(*rows, *skipped)
                        if call.role == "student":
                            x = out = (z - out).float()
                    loss = loss + out.square().mean()
                meter.flop += (count - runs) * (meter.flop - before)
        activations = meter.live
        loss.backward()  # type: ignore[no-untyped-call]
    return StepCost(activations, meter.peak, meter.flop)


def _forward_mode(field: Velocity, x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
    """The field's value, computed together with a directional derivative."""
    return derivative(lambda x_t, t: field(x_t, t, cond), (x_t, t), (x_t, t))[0]


def _autocast(dtype: torch.dtype) -> torch.autocast:
    """The trainer's mixed precision: for bf16, not for fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _inputs(geometry: Geometry, batch: int, size: int) -> tuple[Tensor, TextCondition]:
    config = geometry.transformer
    side = size // geometry.pixels_per_latent
    z = torch.empty(batch, config["in_channels"], side, side)
    embeds = torch.empty(batch, geometry.tokens, config["joint_attention_dim"])
    return z, TextCondition(embeds, torch.empty(batch, config["pooled_projection_dim"]))


def _adam_8bit_bytes(tensor: Tensor) -> int:
    """Bytes of the moments in 8 bits: one byte per number and a scale per block; small tensors stay in fp32."""
    if tensor.numel() < _QUANTIZED:
        return 2 * 4 * tensor.numel()
    return 2 * (tensor.numel() + 4 * -(-tensor.numel() // _BLOCK))


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
