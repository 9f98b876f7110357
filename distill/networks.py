"""Teacher, fake and student: full copies, or two LoRA adapters on one shared base.

Whichever it is, the trainer sees the same: three velocities, the trainable tensors of two roles, and the weights of
the student. A loss differentiates through teacher and fake into their *input* only. That derivative is taken by
`_InputGradient`, which puts the role's adapter on again before it goes backward: gradient checkpointing runs a
network's forward a second time there, and with one base it would otherwise run whichever adapter is active by then.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from distill.config import Full, Lora
from distill.methods import Velocity
from distill.teacher import load_transformer, velocity
from distill.two_times import add_second_time

ROLES = ("fake", "student")


class Networks(Protocol):
    """What the trainer knows of the three roles; `roles` are those that learn. A fake that does not is the teacher."""

    roles: tuple[str, ...]

    def velocity(self, role: str) -> Velocity:
        """The field of "teacher", "fake" or "student" with gradient to its trainable weights, if it has any."""

    def field(self, role: str) -> Velocity:
        """The same with gradient to `x_t` only."""

    def trainable(self, role: str) -> dict[str, Tensor]:
        """The trainable tensors of a role that learns by name; alike for all of them."""

    def using(self, role: str) -> Any:
        """A context in which a backward through `velocity(role)` is right."""


class FullCopies:
    """Transformers from one in fp32: a copy for each role that learns, and the teacher itself, held in `dtype`."""

    def __init__(
        self,
        teacher: SD3Transformer2DModel,
        kind: Full,
        dtype: torch.dtype,
        roles: tuple[str, ...] = ROLES,
        two_times: bool = False,
    ) -> None:
        self.roles = roles
        self._models = {role: deepcopy(teacher).requires_grad_(True) for role in roles}
        if two_times:
            add_second_time(self._models["student"])
        self._models["teacher"] = teacher.to(dtype).requires_grad_(False)
        if kind.checkpointing:
            for model in self._models.values():
                _checkpoint(model)

    def velocity(self, role: str) -> Velocity:
        return partial(velocity, self._models[role if role in self.roles else "teacher"])

    def field(self, role: str) -> Velocity:
        return _field(self.velocity(role), partial(self.using, role))

    def trainable(self, role: str) -> dict[str, Tensor]:
        return dict(self._models[role].named_parameters())

    @contextmanager
    def using(self, role: str) -> Iterator[None]:
        yield


class SharedBase:
    """One transformer with an adapter for each role; the teacher is the base alone."""

    def __init__(
        self, teacher: SD3Transformer2DModel, kind: Lora, roles: tuple[str, ...] = ROLES, two_times: bool = False
    ) -> None:
        self.roles = roles
        config = LoraConfig(
            r=kind.rank,
            lora_alpha=kind.alpha,
            target_modules=list(kind.targets),
            init_lora_weights="gaussian",
        )
        self._model = teacher.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are what is meant
            for role in roles:
                self._model.add_adapter(config, adapter_name=role)
        self._layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
        self._adapters: dict[str, dict[str, torch.nn.Parameter]] = {role: {} for role in roles}
        for name, parameter in self._model.named_parameters():
            for role in roles:
                if f".{role}." in name:
                    parameter.data = parameter.data.float()
                    self._adapters[role][name.replace(f".{role}.", ".")] = parameter  # as peft names them in files
        if two_times:  # the base, asked with one time, does not know of it
            self._adapters["student"] |= add_second_time(self._model)
        self._active: str | None = ""
        self._put_on("student")
        if kind.checkpointing:
            _checkpoint(self._model)

    def velocity(self, role: str) -> Velocity:
        def v(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            with self.using(role):
                return velocity(self._model, x_t, t, cond)

        return v

    def field(self, role: str) -> Velocity:
        return _field(self.velocity(role), partial(self.using, role))

    def trainable(self, role: str) -> dict[str, Tensor]:
        return dict(self._adapters[role])

    @contextmanager
    def using(self, role: str) -> Iterator[None]:
        before = self._active
        self._put_on(role if role in self.roles else None)
        try:
            yield
        finally:
            self._put_on(before)

    def _put_on(self, adapter: str | None) -> None:
        if adapter == self._active:
            return
        for layer in self._layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
        # peft turns gradients off for what it takes off; a graph that still holds it would lose them in silence.
        for parameters in self._adapters.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self._active = adapter


class _InputGradient(torch.autograd.Function):
    """y = f(x), with dy/dx taken under `using()` and no gradient to f's weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor], using: Callable[[], Any]) -> Tensor:
        ctx.using = using
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_(True)
            ctx.y = f(ctx.x)
        y: Tensor = ctx.y.detach()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        with ctx.using():
            (gradient,) = torch.autograd.grad(ctx.y, ctx.x, grads[0])
        del ctx.x, ctx.y
        return gradient, None, None


def _field(v: Velocity, using: Callable[[], Any]) -> Velocity:
    """`v` with gradient to x_t only, right under gradient checkpointing."""

    def field(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        if not (torch.is_grad_enabled() and x_t.requires_grad):
            with torch.no_grad():
                return v(x_t, t, cond)
        apply: Any = _InputGradient.apply
        out: Tensor = apply(x_t, lambda x: v(x, t, cond), using)
        return out

    return field


def _checkpoint(model: SD3Transformer2DModel) -> None:
    model.enable_gradient_checkpointing()
    model.train()  # diffusers checkpoints only in training mode; SD3 has neither dropout nor batch statistics


def build(
    folder: Path | str,
    kind: Full | Lora,
    dtype: torch.dtype,
    device: torch.device,
    roles: tuple[str, ...] = ROLES,
    two_times: bool = False,
) -> FullCopies | SharedBase:
    """The three roles from a teacher folder, of which `roles` learn; the frozen weights are held in `dtype`.

    With `two_times` the student takes a second time, learnt in full beside an adapter.
    """
    if isinstance(kind, Full):
        return FullCopies(load_transformer(folder, torch.float32, device), kind, dtype, roles, two_times)
    return SharedBase(load_transformer(folder, dtype, device), kind, roles, two_times)
