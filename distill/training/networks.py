"""Teacher, fake and student: full copies, or two LoRA adapters on one shared base.

Both have the same interface: three velocities, and the trainable tensors of each role. A loss differentiates through
teacher and fake with respect to their *input* only. `_InputGradient` computes that derivative and activates the role's
adapter again for the backward pass: gradient checkpointing repeats the forward pass there, which would otherwise run
with the adapter that is active by then. Trainable weights are frozen meanwhile, so that nothing is stored or computed
for their gradients.

A shared base can be sharded over a mesh of devices (FSDP2): each block is gathered for its forward and backward pass.
The base is frozen, so it has no gradients to reduce. Adapters are replicated, and their gradients are averaged as
without sharding.
"""

import os
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from importlib.util import find_spec
from typing import Any, Literal

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from distill.config import Full, Lora
from distill.errors import ConfigError
from distill.methods.base import Critic, NetworkVelocity, TrainedNetworks
from distill.models import attention
from distill.models.critic import Head, logits
from distill.models.low_rank import is_target
from distill.models.sd3 import load_transformer, velocity
from distill.models.sd3_folder import SD3Folder
from distill.models.two_times import add_second_time

CRITIC = "critic."  # before the names of a critic's tensors, which are the fake's to train
COMPILED_FORMS = 128  # of a block: by role, gradient, kind of block, and shape; beyond them compilation is an error


class Networks(ABC):
    """The networks of the three roles; `roles` are the trained ones. A fake that is not trained is the teacher."""

    _weights: dict[str, dict[str, torch.nn.Parameter]]  # by role and name

    def __init__(self, teacher: SD3Transformer2DModel, trained: TrainedNetworks) -> None:
        self.roles = trained.roles
        self._head = Head.of(teacher) if trained.critic else None

    @abstractmethod
    def _model(self, role: str) -> SD3Transformer2DModel: ...

    @abstractmethod
    def using(self, role: str) -> AbstractContextManager[None]:
        """A context in which `velocity(role)` can be differentiated: the role's adapter is active."""

    def size(self) -> int:
        """Parameters of one network, including the frozen base of adapters."""
        return sum(parameter.numel() for parameter in self._model("teacher").parameters())

    def modules(self) -> list[torch.nn.Module]:
        """The distinct networks in memory."""
        models = dict.fromkeys(self._model(role) for role in ("teacher", *self.roles))
        return [*models, *([] if self._head is None else [self._head])]

    def velocity(self, role: str) -> NetworkVelocity:
        """The velocity of "teacher", "fake" or "student", with gradient to its trainable weights, if it has any."""

        def v(x_t: Tensor, t: Tensor, cond: Any, skip_layers: Sequence[int] = ()) -> Tensor:
            with self.using(role):
                return velocity(self._model(role), x_t, t, cond, skip_layers)

        return v

    def field(self, role: str) -> NetworkVelocity:
        """The same with gradient to `x_t` only."""
        return self._to_input(role, self.velocity(role))

    def critic(self, learns: bool) -> Critic:
        """The critic on the fake's features, with gradient to both weights if it `learns`, else to `x_t` only."""
        head = self._head
        assert head is not None  # an update phase with a critic has one

        def critic_logits(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            with self.using("fake"):
                return logits(self._model("fake"), head, x_t, t, cond)

        return critic_logits if learns else self._to_input("fake", critic_logits)

    def trainable(self, role: str) -> dict[str, Tensor]:
        """The trainable tensors of a trained role by name. All roles have the same; the fake also has the critic's."""
        head = self._head if role == "fake" else None
        critic = {} if head is None else {CRITIC + name: tensor for name, tensor in head.named_parameters()}
        return {**self._weights[role], **critic}

    def _to_input(self, role: str, v: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`v` with gradient to x_t only, also under gradient checkpointing."""
        weights = list(self.trainable(role).values()) if role in self.roles else []

        @contextmanager
        def context() -> Iterator[None]:
            with self.using(role), _frozen(weights):
                yield

        def field(x_t: Tensor, *others: Any) -> Tensor:
            if not (torch.is_grad_enabled() and x_t.requires_grad):
                with torch.no_grad():
                    return v(x_t, *others)
            apply: Any = _InputGradient.apply
            out: Tensor = apply(x_t, lambda x: v(x, *others), context)
            return out

        return field


class FullCopies(Networks):
    """A copy of the transformer in fp32 for each trained role, and the teacher itself in `dtype`."""

    def __init__(
        self,
        teacher: SD3Transformer2DModel,
        kind: Full,
        dtype: torch.dtype,
        trained: TrainedNetworks = TrainedNetworks(),
    ) -> None:
        super().__init__(teacher, trained)
        self._models = {role: deepcopy(teacher).requires_grad_(True) for role in trained.roles}
        if trained.two_times:
            add_second_time(self._models["student"])
        self._weights = {role: dict(model.named_parameters()) for role, model in self._models.items()}
        self._models["teacher"] = teacher.to(dtype).requires_grad_(False)
        for model in self._models.values():
            _prepare(model, kind)

    def _model(self, role: str) -> SD3Transformer2DModel:
        return self._models[role if role in self.roles else "teacher"]

    def using(self, role: str) -> AbstractContextManager[None]:
        return nullcontext()


class SharedBase(Networks):
    """One transformer with an adapter for each role; the teacher is the base alone.

    Adapters are in fp32, so a base in bf16 is called under autocast.
    """

    def __init__(
        self,
        teacher: SD3Transformer2DModel,
        kind: Lora,
        trained: TrainedNetworks = TrainedNetworks(),
    ) -> None:
        super().__init__(teacher, trained)
        config = LoraConfig(
            r=kind.rank, lora_alpha=kind.alpha, target_modules=list(kind.targets), init_lora_weights="gaussian"
        )
        names = [name for name, _ in teacher.named_modules()]
        known = set(Lora.model_fields["targets"].default)  # a teacher may lack some of the default targets
        for target in kind.targets:
            if target not in known and not any(is_target(name, target) for name in names):
                raise ConfigError(f"networks.targets: the teacher has no layer {target!r}; take names as to_q or net.2")
        self._base = teacher.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # there are two adapters on purpose
            for role in trained.roles:
                self._base.add_adapter(config, adapter_name=role)
        self._layers = [module for module in self._base.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._layers:
            # Under autocast, peft's copy of each input in fp32, the dtype of adapters, would be cast back at once.
            layer.cast_input_dtype_enabled = False
        self._weights = {role: {} for role in trained.roles}
        for name, parameter in self._base.named_parameters():
            for role in trained.roles:
                if f".{role}." in name:
                    parameter.data = parameter.data.float()
                    self._weights[role][name.replace(f".{role}.", ".")] = parameter  # as peft names them in files
        if trained.two_times:  # with one time, the base ignores it
            self._weights["student"] |= add_second_time(self._base)
        self._active: str | None = ""
        self._activate("student")
        _prepare(self._base, kind)

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the base over a mesh of devices; its blocks are gathered one by one."""
        whole = {parameter for parameters in self._weights.values() for parameter in parameters.values()}
        for part in (*self._base.transformer_blocks, self._base):
            fully_shard(part, mesh=mesh, ignored_params=whole)

    def _model(self, role: str) -> SD3Transformer2DModel:
        return self._base

    @contextmanager
    def using(self, role: str) -> Iterator[None]:
        before = self._active
        self._activate(role if role in self.roles else None)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, adapter: str | None) -> None:
        if adapter == self._active:
            return
        for layer in self._layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
        # peft turns off gradients of inactive adapters; a graph that still needs them would silently have none.
        for parameters in self._weights.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self._active = adapter


class _InputGradient(torch.autograd.Function):
    """y = f(x) without gradient to f's weights; f and dy/dx are computed in `context()`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor], context: Callable[[], Any]) -> Tensor:
        ctx.context = context
        with torch.enable_grad(), context():
            ctx.x = x.detach().requires_grad_(True)
            ctx.y = f(ctx.x)
        y: Tensor = ctx.y.detach()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        with ctx.context():
            (gradient,) = torch.autograd.grad(ctx.y, ctx.x, grads[0])
        del ctx.x, ctx.y
        return gradient, None, None


@contextmanager
def _frozen(weights: Sequence[Tensor]) -> Iterator[None]:
    """Freeze trainable weights for the duration of the block."""
    for tensor in weights:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in weights:
            tensor.requires_grad_(True)


def _prepare(model: SD3Transformer2DModel, kind: Full | Lora) -> None:
    """Set up gradient checkpointing and compilation; the blocks are compiled at their first call."""
    if kind.gradient_checkpointing:
        model.enable_gradient_checkpointing()
        model.train()  # diffusers checkpoints only in training mode; SD3 has neither dropout nor batch statistics
    if compiles(kind.compile, model.device):
        torch._dynamo.config.recompile_limit = COMPILED_FORMS
        # Blocks of one kind share their compiled forms, so a deep model starts as fast as a shallow one.
        for block in model.transformer_blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)


def compiles(choice: bool | Literal["auto"], device: torch.device) -> bool:
    """Whether blocks are compiled on a device. Triton, which compiles for GPUs, needs a C compiler at run time."""
    if choice != "auto":
        return choice
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    return device.type == "cuda" and find_spec("triton") is not None and compiler is not None


def build(
    folder: SD3Folder,
    kind: Full | Lora,
    dtype: torch.dtype,
    device: torch.device,
    trained: TrainedNetworks = TrainedNetworks(),
    mesh: DeviceMesh | None = None,
) -> Networks:
    """Build the networks of a run from a teacher folder; frozen weights are in `dtype`.

    A second time and a critic are trained in full beside adapters. With a mesh the shared base is sharded over it, and
    full copies raise ConfigError.
    """
    if mesh is not None and isinstance(kind, Full):
        raise ConfigError(
            "networks.kind full cannot be sharded; train full copies under DDP, or take networks.kind lora for FSDP2"
        )
    model = load_transformer(folder, torch.float32 if isinstance(kind, Full) else dtype, device)
    attention.use(attention.resolve(kind.attention, dtype, device), model)
    if isinstance(kind, Full):
        return FullCopies(model, kind, dtype, trained)
    base = SharedBase(model, kind, trained)
    if mesh is not None:
        base.shard(mesh)
    return base
