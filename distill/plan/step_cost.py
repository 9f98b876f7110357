"""The cost of one optimizer step: the network calls of a loss, run forward and backward while memory is counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from distill.flow import derivative
from distill.methods.base import NetworkVelocity, Real, TrainingBatch, UpdatePhase, Velocities, Velocity
from distill.models.text import TextCondition
from distill.philox import Draw
from distill.plan.meter import Meter
from distill.training.networks import Networks

_DRAWS = 256  # micro-batches by which `skip_share` estimates
SHIFT = 3.0  # of the schedulers of SD3 models; it decides at how many sampling steps layers are skipped


@dataclass(frozen=True)
class StepCost:
    """Cost of one optimizer step: bytes of the activations kept for backward, bytes at the peak, and FLOP."""

    activations: int
    peak: int
    flop: int


@dataclass(frozen=True)
class NetworkCall:
    """A call by a loss, with `rows` batch rows per image, without the blocks `skip_layers`.

    `backward` and `forward_mode` tell whether there is a gradient through it, or a directional derivative.
    """

    role: str
    rows: int
    backward: bool
    forward_mode: bool
    skip_layers: tuple[int, ...] = ()


def skip_share(phase: UpdatePhase, batch: int) -> float:
    """The share of the calls with skip-layer guidance in [0, 1] that a loss makes, for micro-batches of `batch` images.

    It leaves them out if all times of a micro-batch are outside of the interval. Estimated by running the loss.
    """
    if not (full := sum(bool(call.skip_layers) for call in network_calls(phase))):
        return 1.0
    calls = (call for draw in range(_DRAWS) for call in network_calls(phase, range(draw * batch, (draw + 1) * batch)))
    return sum(bool(call.skip_layers) for call in calls) / (full * _DRAWS)


def network_calls(phase: UpdatePhase, images: range | None = None) -> list[NetworkCall]:
    """List the network calls of an update phase's loss in order, by running it.

    With indices of `images`, only those that a micro-batch of their random numbers needs; otherwise all that there are.
    """
    calls = []
    drawn = images or range(1)

    def recorder(role: str) -> NetworkVelocity:
        def record(x_t: Tensor, t: Tensor, cond: TextCondition, skip_layers: Sequence[int] = ()) -> Tensor:
            dual = any(unpack_dual(x).tangent is not None for x in (x_t, t))  # type: ignore[no-untyped-call]
            calls.append(NetworkCall(role, len(x_t) // len(drawn), torch.is_grad_enabled(), dual, tuple(skip_layers)))
            return x_t.flatten(1).mean(1) if role == "critic" else x_t

        return record

    null = TextCondition(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    fields = (recorder("student"), recorder("teacher"), recorder("fake"))
    nets = Velocities(*fields, null, recorder("critic"), SHIFT, conditional_calls=images is not None)
    x, cond = torch.zeros(len(drawn), 1, 2, 2), null.expand(len(drawn))
    phase.loss(nets, TrainingBatch(x, cond, Draw(0, "plan", drawn), Real(x, cond)))
    return calls


def simulate_step(
    networks: Networks, role: str, calls: list[NetworkCall], z: Tensor, cond: TextCondition, dtype: torch.dtype
) -> StepCost:
    """Run forward and backward of a step of `role` as the trainer does, from noise `z` (B, C, h, w).

    The network calls are the loss's own; its arithmetic on latents between them is replaced by a square.
    """
    with Meter() as meter, networks.using(role):
        with autocast(dtype):
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


def autocast(dtype: torch.dtype) -> torch.autocast:
    """The trainer's mixed precision: for bf16, not for fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
