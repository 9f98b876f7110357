"""Memory and arithmetic of a distillation, from configuration files alone.

The real networks run the network calls of the real method, forward and backward, on tensors without data, and every
live storage is counted. Memory is in bytes, arithmetic in FLOP (a multiply-add is two). A plan leaves out the rounding
of the GPU's allocator, library workspaces and the CUDA context; the caller reserves memory for them.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.config import Full, Lora
from distill.flow import one_step
from distill.methods.base import TrainedNetworks
from distill.models.geometry import Geometry
from distill.models.sd3 import decode_in_parts
from distill.models.text import TextCondition
from distill.plan.meter import Meter, without_data
from distill.plan.step_cost import StepCost, autocast, network_calls, simulate_step, skip_share
from distill.training.evaluation import GRID
from distill.training.networks import FullCopies, Networks, SharedBase

_STEP_PARTS = ("activations", "peak", "flop")  # of a StepCost
_QUANTIZED, _BLOCK = 4096, 256  # elements of the smallest tensor that bitsandbytes quantizes, and per scale


@dataclass(frozen=True)
class Plan:
    """Bytes by part and by stage of a run, and FLOP per image.

    `resident` memory is held throughout training. `stages` are totals, each the peak of one stage. `activations` and
    `temporary` are those of the heaviest update phase, beyond resident memory; `temporary` includes gradients.
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
        """Bytes of resident memory, and of the heaviest update phase beyond it."""
        return {
            **self.resident,
            "gradients after the update": self.gradients,
            "activations kept for the backward pass": self.activations,
            "temporary peak, gradients included": self.temporary,
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
    encoders_apart: bool = False  # whether the text encoders are then on another device
    t5: Literal["full", "int8"] = "full"  # precision of T5 then

    @property
    def prompt_bytes(self) -> int:
        """Bytes of an encoded prompt."""
        config = self.geometry.transformer
        numbers = self.geometry.tokens * config["joint_attention_dim"] + config["pooled_projection_dim"]
        return int(self.dtype.itemsize * numbers)

    @property
    def text_bytes(self) -> int:
        """Bytes of the text encoders on the training device during training."""
        if not self.online or self.encoders_apart:
            return 0
        spared = self.dtype.itemsize - 1 if self.t5 == "int8" else 0
        return self.dtype.itemsize * self.geometry.text_parameters - spared * self.geometry.t5_matrix_parameters

    def plan(self) -> Plan:
        """Compute the cost; takes seconds and little memory. Raises SizeError."""
        self.geometry.check_size(self.size)
        counts, phases = self._counts_of_all_blocks(), self.method.update_phases()
        roles = TrainedNetworks.of(phases).roles
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
            "text encoders": self.text_bytes,
        }
        always = sum(resident.values())
        heaviest = max(costs.values(), key=lambda cost: cost.peak)
        stages = {
            # The text encoders of the grids' prompts are unloaded before the networks are loaded.
            "start": counts["autoencoder"] + self.dtype.itemsize * self.geometry.text_parameters,
            **{f"{role} update": always + cost.peak for role, cost in costs.items()},
            "optimizer step": always + max(own.values()),  # gradients; Adam works in place
            # The student's own weights are kept while its average runs.
            "sample grid": always + own["student"] + counts["grid"],
        }
        flop = 0.0
        for phase in phases:
            spared = (1 - skip_share(phase, self.batch)) * counts[f"{phase.role} skip flop"]
            flop += phase.steps * (costs[phase.role].flop - spared)
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
        for role in TrainedNetworks.of(self.method.update_phases()).roles:
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
        phases = self.method.update_phases()
        calls = {phase.role: network_calls(phase) for phase in phases}
        others = {role: [call for call in called if not call.skip_layers] for role, called in calls.items()}
        if skip is not None:
            calls = {
                role: [replace(call, skip_layers=skip) if call.skip_layers else call for call in called]
                for role, called in calls.items()
            }
        networks = build(geometry, kind, dtype, TrainedNetworks.of(phases))
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
            **{f"{role} skip flop": 0 for role in calls},
            **{f"{role} weights": sum(tensor.nbytes for tensor in tensors) for role, tensors in trainable.items()},
        }
        with FakeTensorMode():
            for model in [*models, vae]:
                without_data(model)
            for role in calls:
                z, cond = _inputs(geometry, self.batch, self.size)
                cost = simulate_step(networks, role, calls[role], z, cond, dtype)
                counts |= {f"{role} {part}": getattr(cost, part) for part in _STEP_PARTS}
                if len(others[role]) < len(calls[role]):
                    cost_of_others = simulate_step(networks, role, others[role], z, cond, dtype)
                    counts[f"{role} skip flop"] = cost.flop - cost_of_others.flop
                for tensor in networks.trainable(role).values():
                    tensor.grad = None

            z, cond = _inputs(geometry, GRID, self.size)
            with Meter() as meter, torch.no_grad():
                with autocast(dtype):
                    x_0 = one_step(networks.velocity("student"), z, cond)
                decode_in_parts(vae, x_0)
            counts["grid"] = meter.peak + sum(tensor.nbytes for tensor in (z, cond.embeds, cond.pooled))
        return counts


def build(
    geometry: Geometry,
    kind: Full | Lora,
    dtype: torch.dtype,
    trained: TrainedNetworks = TrainedNetworks(),
    device: str = "meta",
) -> Networks:
    """Build a run's networks as `networks.build` does, without loading weights."""
    with torch.device(device):
        model = SD3Transformer2DModel.from_config(geometry.transformer).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                # Autocast on CUDA normalizes in fp32. The CPU's rules, which apply to tensors without data, do not.
                module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
        if isinstance(kind, Lora):
            return SharedBase(model.to(dtype), kind, trained)
        return FullCopies(model, kind, dtype, trained)


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
