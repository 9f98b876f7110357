"""Whether a distillation fits a device, and what it costs, from configuration files alone.

Nothing is estimated that can be measured: the real networks, the fields of the real method and their real backward run
on tensors without data, and every storage that lives is counted. Memory is in bytes, arithmetic in FLOP (a
multiply-add is two). What the GPU's allocator rounds, its libraries' workspaces and its context are not in a plan's
metrics; the caller sets memory aside for them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.forward_ad import unpack_dual

from distill.config import Full, Lora, load_config
from distill.flow import derivative, one_step
from distill.methods.base import Real, TrainingBatch, Turn, Velocities, Velocity
from distill.models.geometry import Geometry
from distill.models.sd3 import decode_in_parts
from distill.models.text import TextCondition
from distill.philox import Draw
from distill.plan.meter import Meter, without_data
from distill.run import GRID
from distill.training.networks import ROLES, FullCopies, SharedBase

GIB = 2**30

_QUANTIZED, _BLOCK = 4096, 256  # numbers: of the smallest tensor that bitsandbytes quantizes, of a block with one scale


@dataclass(frozen=True)
class Turned:
    """What one turn of the method does for a batch: bytes that its backward waits with, bytes at its worst, FLOP."""

    kept: int
    peak: int
    flop: int


@dataclass(frozen=True)
class Plan:
    """Bytes by part and by moment, FLOP by image.

    `resident` is there from the first step to the last. `moments` are totals: the run's own peaks, one of which is the
    largest. `activations` and `temporary` are those of the heaviest turn, beyond what is resident; gradients, which
    come while activations go, are within `temporary`.
    """

    parameters: int  # of the transformer
    trainable: int  # parameters of one role
    resident: dict[str, int]
    gradients: int
    activations: int
    temporary: int
    moments: dict[str, int]
    flop_per_image: float
    states: dict[str, int]  # of the optimizers, by each kind that there is

    @property
    def peak(self) -> int:
        """Bytes at the heaviest moment of the run."""
        return max(self.moments.values())

    def parts(self) -> dict[str, int]:
        """Bytes of what is resident, and of the heaviest turn on top of it."""
        return {
            **self.resident,
            "gradients, when the turn ends": self.gradients,
            "activations kept for backward": self.activations,
            "peak temporary, gradients within": self.temporary,
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with their units in their names."""
        return {
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "parts_bytes": self.parts(),
            "moments_bytes": self.moments,
            "peak_bytes": self.peak,
            "flop_per_image": self.flop_per_image,
        }


@dataclass(frozen=True)
class Setting:
    """What a plan is made for: `batch` images of `size` x `size` pixels in each forward (a run's `micro_batch`).

    `optimizer` is the kind that a run's configuration names.
    """

    geometry: Geometry
    kind: Full | Lora
    dtype: torch.dtype
    batch: int
    size: int
    method: Any
    optimizer: Literal["adam", "adam-8bit"] = "adam"

    def plan(self) -> Plan:
        """Measure: half a minute for SD3-medium, and no memory to speak of; raises SizeError."""
        geometry, dtype = self.geometry, self.dtype
        geometry.check_size(self.size)
        # Operations are counted one by one, and a compiler has nothing to run; its fused ones keep no more than these.
        kind = self.kind.model_copy(update={"compile": False})
        turns = self.method.turns()
        asked = {turn.role: asks(turn) for turn in turns}
        two_times, critic = any(turn.two_times for turn in turns), any(turn.critic for turn in turns)
        networks, models = build(geometry, kind, dtype, tuple(sorted(asked)), two_times=two_times, critic=critic)
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(geometry.vae).eval().requires_grad_(False)
        weights, vae_bytes = sum(map(_nbytes, models)), _nbytes(vae)
        owned = {role: list(networks.trainable(role).values()) for role in networks.roles}
        own = {role: sum(tensor.nbytes for tensor in tensors) for role, tensors in owned.items()}
        learnt = [tensor for tensors in owned.values() for tensor in tensors]
        states = {"adam": sum(map(_moments, learnt)), "adam-8bit": sum(map(_moments_8bit, learnt))}
        with FakeTensorMode():
            for model in [*models, vae]:
                without_data(model)
            turned: dict[str, Turned] = {}
            for role, fields in asked.items():
                z, cond = _inputs(geometry, self.batch, self.size)
                turned[role] = take_turn(networks, role, fields, z, cond, dtype)
                for tensor in networks.trainable(role).values():
                    tensor.grad = None

            z, cond = _inputs(geometry, GRID, self.size)
            with Meter() as meter, torch.no_grad():
                with _autocast(dtype):
                    x_0 = one_step(networks.velocity("student"), z, cond)
                decode_in_parts(vae, x_0)
            grid = meter.peak + sum(tensor.nbytes for tensor in (z, cond.embeds, cond.pooled))

        resident = {
            "base weights": weights - sum(own.values()),
            "student weights": own["student"],
            "fake weights": own.get("fake", 0),  # with its critic
            "averaged student": own["student"],
            "optimizer states": states[self.optimizer],
            "autoencoder for grids": vae_bytes,
        }
        always = sum(resident.values())
        heaviest = max(turned.values(), key=lambda turn: turn.peak)
        moments = {
            # The encoders that encode the grids' prompts go before the networks come.
            "start": vae_bytes + dtype.itemsize * geometry.text_parameters,
            **{f"{role}'s turn": always + turn.peak for role, turn in turned.items()},
            "optimizer step": always + max(own.values()),  # gradients; Adam goes through its tensors in place
            "sample grid": always + own["student"] + grid,  # the student's own weights, kept aside
        }
        flop = sum(turn.steps * turned[turn.role].flop for turn in turns)
        return Plan(
            parameters=geometry.parameters,
            trainable=sum(tensor.numel() for tensor in owned["student"]),
            resident=resident,
            gradients=max(own.values()),
            activations=heaviest.kept,
            temporary=heaviest.peak - heaviest.kept,
            moments=moments,
            flop_per_image=flop / self.batch,
            states=states,
        )


def setting(
    geometry: Geometry,
    mode: str,
    rank: int,
    gradient_checkpointing: bool,
    dtype: str,
    batch: int,
    size: int,
    method: str = "fgm",
    optimizer: Literal["adam", "adam-8bit"] = "adam",
) -> Setting:
    """A setting in the command's words, with the targets of every LoRA run.

    The method is chosen in the preset for SD3. Raises ConfigError for one that does not exist.
    """
    chosen = load_config("sd3-medium-lora", [f"method.name={method}"]).method
    kind = (
        Lora(rank=rank, gradient_checkpointing=gradient_checkpointing)
        if mode == "lora"
        else Full(gradient_checkpointing=gradient_checkpointing)
    )
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Setting(geometry, kind, precision, batch, size, chosen, optimizer)


def changes_that_fit(setting: Setting, plan: Plan, available: int) -> list[str]:
    """Single changes after which the peak is at most `available` bytes; empty when none is enough."""
    kind = setting.kind
    found = []
    if not kind.gradient_checkpointing:
        checkpointed = replace(setting, kind=kind.model_copy(update={"gradient_checkpointing": True}))
        if checkpointed.plan().peak <= available:
            found.append("--gradient-checkpointing")
    # At every moment but the start, when there are no networks yet, the states are there.
    saved = plan.states[setting.optimizer] - plan.states["adam-8bit"]
    if saved and max(plan.moments["start"], plan.peak - saved) <= available:
        found.append("--optimizer adam-8bit")
    if isinstance(kind, Full):
        lora = Lora(gradient_checkpointing=kind.gradient_checkpointing)
        if replace(setting, kind=lora).plan().peak <= available:
            found.append(f"--mode lora --rank {lora.rank}")
    if setting.batch > 1:
        least = replace(setting, batch=1).plan().peak
        if least <= available:
            # The peak is convex in the batch, a largest of straight lines, so the chord is on the safe side.
            share = (available - least) / (plan.peak - least)
            found.append(f"--batch {1 + int(share * (setting.batch - 1))}")
    return found


def build(
    geometry: Geometry,
    kind: Full | Lora,
    dtype: torch.dtype,
    roles: tuple[str, ...] = ROLES,
    device: str = "meta",
    two_times: bool = False,
    critic: bool = False,
) -> tuple[FullCopies | SharedBase, list[nn.Module]]:
    """The networks of a run, as `networks.build` makes them but for the loading, and the models that they are of."""
    with torch.device(device):
        model = SD3Transformer2DModel.from_config(geometry.transformer).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                # Autocast on CUDA normalizes in fp32; tensors without data are cast by the CPU's rules, which do not.
                module.register_forward_pre_hook(_to_fp32)
        networks: FullCopies | SharedBase
        if isinstance(kind, Lora):
            networks, models = SharedBase(model.to(dtype), kind, roles, two_times, critic), [model]
        else:
            networks = FullCopies(model, kind, dtype, roles, two_times, critic)
            models = list(networks._models.values())
        return networks, models if networks._head is None else [*models, networks._head]


def _to_fp32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


@dataclass(frozen=True)
class Asked:
    """A field that a loss asks, with how many rows for each image.

    `learns`: a gradient is to come back; `derived`: its derivative along a direction is asked as well.
    """

    role: str
    rows: int
    learns: bool
    derived: bool


def asks(turn: Turn) -> list[Asked]:
    """Which fields the turn's loss asks, in order; found by running it."""
    found = []

    def asked(role: str) -> Callable[[Tensor, Tensor, TextCondition], Tensor]:
        def field(x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
            derived = any(unpack_dual(x).tangent is not None for x in (x_t, t))  # type: ignore[no-untyped-call]
            found.append(Asked(role, len(x_t), torch.is_grad_enabled(), derived))
            return x_t

        return field

    cond = TextCondition(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    nets = Velocities(asked("student"), asked("teacher"), asked("fake"), cond, asked("critic"))
    x = torch.zeros(1, 1, 2, 2)
    turn.loss(nets, TrainingBatch(x, cond, Draw(0, "plan", range(1)), Real(x, cond)))
    return found


def take_turn(
    networks: FullCopies | SharedBase,
    role: str,
    asked: list[Asked],
    z: Tensor,
    cond: TextCondition,
    dtype: torch.dtype,
) -> Turned:
    """Forward and backward of a turn of `role` as the trainer runs them, from noise `z` (B, C, h, w).

    The fields asked are the loss's own; its arithmetic between them, on latents alone, is a plain square.
    """
    with Meter() as meter, networks.using(role):
        with _autocast(dtype):
            t = torch.ones(len(z))
            x, loss = z, torch.zeros(())
            for each, alike in groupby(asked):
                count, before = len(list(alike)), meter.flop
                if each.role == "critic":
                    field = networks.critic(role == "fake")
                else:
                    field = networks.velocity(each.role) if each.role == role else networks.field(each.role)
                # A field that keeps nothing costs the same every time: once tells of a whole path of a sampler.
                runs = count if each.learns else 1
                for _ in range(runs):
                    rows = torch.cat([x] * each.rows), torch.cat([t] * each.rows), TextCondition.cat([cond] * each.rows)
                    with torch.set_grad_enabled(each.learns):
                        out = _derived(field, *rows) if each.derived else field(*rows)
                        if each.role == "student":
                            x = out = (z - out).float()
                    loss = loss + out.square().mean()
                meter.flop += (count - runs) * (meter.flop - before)
        kept = meter.live
        loss.backward()  # type: ignore[no-untyped-call]
    return Turned(kept, meter.peak, meter.flop)


def _derived(field: Velocity, x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
    """The field's value, computed together with a derivative."""
    return derivative(lambda x_t, t: field(x_t, t, cond), (x_t, t), (x_t, t))[0]


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """The trainer's: mixed precision for bf16, none for fp32."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield


def _inputs(geometry: Geometry, batch: int, size: int) -> tuple[Tensor, TextCondition]:
    config = geometry.transformer
    side = size // geometry.pixels_per_latent
    z = torch.empty(batch, config["in_channels"], side, side)
    embeds = torch.empty(batch, geometry.tokens, config["joint_attention_dim"])
    return z, TextCondition(embeds, torch.empty(batch, config["pooled_projection_dim"]))


def _moments(tensor: Tensor) -> int:
    """Bytes of Adam's two moments; its step counts are too small to count."""
    return 2 * tensor.nbytes


def _moments_8bit(tensor: Tensor) -> int:
    """The same in bitsandbytes' form: a byte for each number and a scale for each block; small tensors stay in fp32."""
    if tensor.numel() < _QUANTIZED:
        return 2 * 4 * tensor.numel()
    return 2 * (tensor.numel() + 4 * -(-tensor.numel() // _BLOCK))


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
