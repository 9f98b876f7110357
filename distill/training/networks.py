"""Teacher, fake and student: full copies, or two LoRA adapters on one shared base.

Whichever it is, the trainer sees the same: three velocities, the trainable tensors of two roles, and the weights of
the student. A loss differentiates through teacher and fake into their *input* only. That derivative is taken by
`_InputGradient`, which puts the role's adapter on again before it goes backward: gradient checkpointing runs a
network's forward a second time there, and with one base it would otherwise run whichever adapter is active by then.
Weights that would learn are held meanwhile, so that nothing is kept or computed for their sake.

A shared base can be sharded over a mesh of devices (FSDP2): each block is gathered for its forward and for its
backward. It is frozen, so nothing of it is ever reduced; adapters stay whole on every device, and their gradients are
averaged as without sharding.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from distill.config import Full, Lora
from distill.errors import ConfigError
from distill.methods.base import Critic, Velocity
from distill.models import attention
from distill.models.critic import Head, logits
from distill.models.sd3 import load_transformer, velocity
from distill.models.sd3_folder import SD3Folder
from distill.models.two_times import add_second_time

ROLES = ("fake", "student")
CRITIC = "critic."  # before the names of a critic's tensors, which are the fake's to train
COMPILED_FORMS = 64  # of a block: by role, gradient, last or not, and batch; beyond them compilation is an error


class Networks(Protocol):
    """What the trainer knows of the three roles; `roles` are those that learn. A fake that does not is the teacher."""

    roles: tuple[str, ...]

    def size(self) -> int:
        """Numbers in the weights of one network, the frozen base of adapters included."""

    def velocity(self, role: str) -> Velocity:
        """The field of "teacher", "fake" or "student" with gradient to its trainable weights, if it has any."""

    def field(self, role: str) -> Velocity:
        """The same with gradient to `x_t` only."""

    def critic(self, learns: bool) -> Critic:
        """The critic on the fake's features, with gradient to its weights and the fake's if it learns, or to `x_t`."""

    def trainable(self, role: str) -> dict[str, Tensor]:
        """The trainable tensors of a role that learns by name; alike for all, but for a critic's among the fake's."""

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
        critic: bool = False,
    ) -> None:
        self.roles = roles
        self._head = Head.of(teacher) if critic else None
        self._models = {role: deepcopy(teacher).requires_grad_(True) for role in roles}
        if two_times:
            add_second_time(self._models["student"])
        self._models["teacher"] = teacher.to(dtype).requires_grad_(False)
        for model in self._models.values():
            _prepare(model, kind)

    def size(self) -> int:
        return _size(self._models["teacher"])

    def velocity(self, role: str) -> Velocity:
        return partial(velocity, self._models[role if role in self.roles else "teacher"])

    def field(self, role: str) -> Velocity:
        weights = list(self.trainable(role).values()) if role in self.roles else []
        return _field(self.velocity(role), partial(_held, weights))

    def critic(self, learns: bool) -> Critic:
        assert self._head is not None  # a turn asked for it
        judge = partial(logits, self._models["fake"], self._head)
        return judge if learns else _field(judge, partial(_held, list(self.trainable("fake").values())))

    def trainable(self, role: str) -> dict[str, Tensor]:
        return dict(self._models[role].named_parameters()) | _of_critic(self._head, role)

    @contextmanager
    def using(self, role: str) -> Iterator[None]:
        yield


class SharedBase:
    """One transformer with an adapter for each role; the teacher is the base alone."""

    def __init__(
        self,
        teacher: SD3Transformer2DModel,
        kind: Lora,
        roles: tuple[str, ...] = ROLES,
        two_times: bool = False,
        critic: bool = False,
    ) -> None:
        self.roles = roles
        self._head = Head.of(teacher) if critic else None
        config = LoraConfig(
            r=kind.rank, lora_alpha=kind.alpha, target_modules=list(kind.targets), init_lora_weights="gaussian"
        )
        names = [name for name, _ in teacher.named_modules()]
        known = set(Lora.model_fields["targets"].default)  # a teacher may lack some of the default targets
        for target in kind.targets:
            if target not in known and not any(name == target or name.endswith(f".{target}") for name in names):
                raise ConfigError(f"networks.targets: the teacher has no layer {target!r}; take names as to_q or net.2")
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
        _prepare(self._model, kind)

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep of the base only this process's share, gathered block by block where it is needed."""
        whole: set[torch.nn.Parameter] = set()
        for parameters in self._adapters.values():
            whole.update(parameters.values())
        for block in self._model.transformer_blocks:
            fully_shard(block, mesh=mesh, ignored_params=whole)
        fully_shard(self._model, mesh=mesh, ignored_params=whole)

    def size(self) -> int:
        return _size(self._model)

    def velocity(self, role: str) -> Velocity:
        def v(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            with self.using(role):
                return velocity(self._model, x_t, t, cond)

        return v

    def field(self, role: str) -> Velocity:
        return _field(self.velocity(role), partial(self._passing, role))

    def critic(self, learns: bool) -> Critic:
        assert self._head is not None  # a turn asked for it
        head = self._head

        def judge(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            with self.using("fake"):
                return logits(self._model, head, x_t, t, cond)

        return judge if learns else _field(judge, partial(self._passing, "fake"))

    def trainable(self, role: str) -> dict[str, Tensor]:
        return dict(self._adapters[role]) | _of_critic(self._head, role)

    @contextmanager
    def _passing(self, role: str) -> Iterator[None]:
        """The role's adapter on, and what learns with it held."""
        with self.using(role), _held(self.trainable(role).values() if role in self.roles else ()):
            yield

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
    """y = f(x), computed and with dy/dx taken under `passing()`, and no gradient to f's weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor], passing: Callable[[], Any]) -> Tensor:
        ctx.passing = passing
        with torch.enable_grad(), passing():
            ctx.x = x.detach().requires_grad_(True)
            ctx.y = f(ctx.x)
        y: Tensor = ctx.y.detach()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        with ctx.passing():
            (gradient,) = torch.autograd.grad(ctx.y, ctx.x, grads[0])
        del ctx.x, ctx.y
        return gradient, None, None


def _field(v: Velocity, passing: Callable[[], Any]) -> Velocity:
    """`v` with gradient to x_t only, right under gradient checkpointing."""

    def field(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        if not (torch.is_grad_enabled() and x_t.requires_grad):
            with torch.no_grad():
                return v(x_t, t, cond)
        apply: Any = _InputGradient.apply
        out: Tensor = apply(x_t, lambda x: v(x, t, cond), passing)
        return out

    return field


def _size(model: SD3Transformer2DModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _of_critic(head: Head | None, role: str) -> dict[str, Tensor]:
    """A head's tensors, which are the fake's to train, by names that no transformer's tensors have."""
    if head is None or role != "fake":
        return {}
    return {CRITIC + name: tensor for name, tensor in head.named_parameters()}


@contextmanager
def _held(weights: Iterable[Tensor]) -> Iterator[None]:
    """Weights that learn, taking no gradient for a while."""
    weights = list(weights)
    for tensor in weights:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in weights:
            tensor.requires_grad_(True)


def _prepare(model: SD3Transformer2DModel, kind: Full | Lora) -> None:
    """What `kind` says of memory and speed; the blocks compile when they first run."""
    if kind.gradient_checkpointing:
        model.enable_gradient_checkpointing()
        model.train()  # diffusers checkpoints only in training mode; SD3 has neither dropout nor batch statistics
    if kind.compile:
        compiled: Any = torch.compile  # whose overloads leave out the limit
        # Blocks of one kind share their compiled forms, so a deep model starts as fast as a shallow one.
        for block in model.transformer_blocks:
            block.forward = compiled(block.forward, fullgraph=True, recompile_limit=COMPILED_FORMS)


def build(
    folder: SD3Folder,
    kind: Full | Lora,
    dtype: torch.dtype,
    device: torch.device,
    roles: tuple[str, ...] = ROLES,
    two_times: bool = False,
    critic: bool = False,
    mesh: DeviceMesh | None = None,
) -> FullCopies | SharedBase:
    """The three roles from a teacher folder, of which `roles` learn; the frozen weights are held in `dtype`.

    With `two_times` the student takes a second time, learned in full beside an adapter; with a `critic` the fake gets
    its head. With a mesh the shared base is sharded over it. Raises ConfigError for full copies then.
    """
    if mesh is not None and isinstance(kind, Full):
        raise ConfigError(
            "networks.kind full cannot be sharded; train full copies under DDP, or take networks.kind lora for FSDP2"
        )
    model = load_transformer(folder, torch.float32 if isinstance(kind, Full) else dtype, device)
    attention.use(attention.resolve(kind.attention, dtype, device), model)
    if isinstance(kind, Full):
        return FullCopies(model, kind, dtype, roles, two_times, critic)
    base = SharedBase(model, kind, roles, two_times, critic)
    if mesh is not None:
        base.shard(mesh)
    return base
