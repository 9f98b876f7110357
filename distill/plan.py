"""Whether a distillation fits a device, and what it costs, from configuration files alone.

Nothing is estimated that can be measured: the real networks, the fields of the real method and their real backward run
on tensors without data, and every storage that lives is counted. Memory is in bytes, arithmetic in FLOP (a
multiply-add is two). What the GPU's allocator rounds, its libraries' workspaces and its context are not in a plan's
figures; the caller sets memory aside for them.
"""

import difflib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from distill import methods
from distill.config import Full, Lora, load_config
from distill.errors import ConfigError, TeacherError
from distill.flow import Draw, derivative, one_step
from distill.methods import Batch, Real, Turn, Velocities, Velocity
from distill.networks import ROLES, FullCopies, SharedBase
from distill.run import GRID
from distill.spec import RECORD, check_size, read_json
from distill.teacher import decode_latents
from distill.text import TextCondition

GIB = 2**30

_aten = torch.ops.aten
# FLOP of an operation from its arguments. The CPU's attention keeps what CUDA's fused kernels keep, and costs the same.
_FLOP = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}

_STOCK_TOKENS = (77, 256)  # CLIP's and T5's
_SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
_NAMED: dict[str, dict[str, Any]] = {
    "sd3-medium": _SD3
    | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    "sd3.5-medium": _SD3
    | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
    | {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    "sd3.5-large": _SD3
    | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
    | {"qk_norm": "rms_norm"},
}
NAMES = tuple(_NAMED)
_QUANTISED, _BLOCK = 4096, 256  # numbers: of the smallest tensor that bitsandbytes quantises, of a block with one scale
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "projection_dim": 768}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}
_T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128} | {
    "feed_forward_proj": "gated-gelu"
}
_TEXT: dict[str, dict[str, Any]] = {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL}


@dataclass(frozen=True)
class Geometry:
    """Configurations of a teacher's parts, as its folder has them; `tokens` of a prompt, all encoders together."""

    name: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, dict[str, Any]]
    tokens: int

    @property
    def pixels_per_latent(self) -> int:
        """Side of a latent pixel in image pixels."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def image_size(self) -> int:
        """Native height and width in image pixels."""
        return int(self.transformer["sample_size"]) * self.pixels_per_latent

    def check_size(self, size: int) -> None:
        """Raise SizeError unless images of `size` x `size` pixels can be made."""
        unit = self.pixels_per_latent * int(self.transformer["patch_size"])
        check_size(size, size, unit, int(self.transformer["pos_embed_max_size"]), self.name)


def read_geometry(teacher: str) -> Geometry:
    """Of a named model or of a folder, where `transformer/config.json` is enough: SD3's stand for what is missing.

    Raises TeacherError for a name that there is not, or a folder of something else.
    """
    if teacher in _NAMED:
        return Geometry(teacher, _NAMED[teacher], _VAE, _TEXT, sum(_STOCK_TOKENS))
    folder = Path(teacher)
    if not folder.is_dir():
        close = difflib.get_close_matches(teacher, NAMES, len(NAMES), 0.5) or NAMES
        raise TeacherError(f"{teacher!r} is neither a folder nor a known model; the nearest are {', '.join(close)}")
    path = folder / "transformer" / "config.json"
    transformer = read_json(path)
    if transformer.get("_class_name") != SD3Transformer2DModel.__name__:
        raise TeacherError(
            f"{path} is of a {transformer.get('_class_name')}, not of a {SD3Transformer2DModel.__name__}"
        )
    missing = [key for key in _SD3 if key not in transformer and key != "out_channels"]
    if missing:
        raise TeacherError(f"{path} lacks {missing[0]}; save the pipeline again")

    def read(name: str, otherwise: dict[str, Any]) -> dict[str, Any]:
        path = folder / name
        return read_json(path) if path.exists() else otherwise

    # A folder with any text encoder says by what it lacks that it has no T5.
    text = {name: read_json(folder / name / "config.json") for name in _TEXT if (folder / name).is_dir()} or _TEXT
    clip, t5 = _STOCK_TOKENS
    clip = read("tokenizer/tokenizer_config.json", {}).get("model_max_length", clip)
    t5 = read(RECORD, {}).get("max_sequence_length", t5)
    return Geometry(folder.resolve().name, transformer, read("vae/config.json", _VAE), text, clip + t5)


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
        turns = self.method.turns()
        asked = {turn.role: asks(turn) for turn in turns}
        two_times, critic = any(turn.two_times for turn in turns), any(turn.critic for turn in turns)
        networks, models = build(geometry, self.kind, dtype, tuple(sorted(asked)), two_times=two_times, critic=critic)
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
                decode_latents(vae, x_0)
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
            "start": vae_bytes + dtype.itemsize * _text_parameters(geometry),
            **{f"{role}'s turn": always + turn.peak for role, turn in turned.items()},
            "optimizer step": always + max(own.values()),  # gradients; Adam goes through its tensors in place
            "sample grid": always + own["student"] + grid,  # the student's own weights, kept aside
        }
        flop = sum(turn.steps * turned[turn.role].flop for turn in turns)
        return Plan(
            parameters=_parameters(geometry),
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
    checkpointing: bool,
    dtype: str,
    batch: int,
    size: int,
    method: str = "fgm",
    optimizer: Literal["adam", "adam-8bit"] = "adam",
) -> Setting:
    """A setting in the command's words, with the targets of every LoRA run.

    The method is as the preset for SD3 has it, or another with its own settings. Raises ConfigError when there is none
    of the name.
    """
    if method not in methods.names():
        raise ConfigError(f"no method {method!r}; there are {', '.join(methods.names())}")
    preset = load_config("sd3-medium-lora").method
    chosen = preset if preset.name == method else methods.config_class(method)()
    kind = Lora(rank=rank, checkpointing=checkpointing) if mode == "lora" else Full(checkpointing=checkpointing)
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Setting(geometry, kind, precision, batch, size, chosen, optimizer)


def changes_that_fit(setting: Setting, plan: Plan, available: int) -> list[str]:
    """Single changes after which the peak is at most `available` bytes; empty when none is enough."""
    kind = setting.kind
    found = []
    if not kind.checkpointing:
        checkpointed = replace(setting, kind=kind.model_copy(update={"checkpointing": True}))
        if checkpointed.plan().peak <= available:
            found.append("--checkpointing")
    # At every moment but the start, when there are no networks yet, the states are there.
    saved = plan.states[setting.optimizer] - plan.states["adam-8bit"]
    if saved and max(plan.moments["start"], plan.peak - saved) <= available:
        found.append("--optimizer adam-8bit")
    if isinstance(kind, Full):
        lora = Lora(checkpointing=kind.checkpointing)
        if replace(setting, kind=lora).plan().peak <= available:
            found.append(f"--mode lora --rank {lora.rank}")
    if setting.batch > 1:
        least = replace(setting, batch=1).plan().peak
        if least <= available:
            # The peak is convex in the batch, a largest of straight lines, so the chord is on the safe side.
            share = (available - least) / (plan.peak - least)
            found.append(f"--batch {1 + int(share * (setting.batch - 1))}")
    return found


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOP, and bytes of the storages that operations make while it is on: `live` ones, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.flop = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in _FLOP:
            self.flop += _FLOP[func._overloadpacket](*args, **kwargs, out_val=out)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if made:  # more than half of all calls ask a tensor without data for its device and the like
            before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for x in made:
                # What shares storage with an argument is a view of it, or the argument itself.
                if x.untyped_storage()._cdata not in before:
                    self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


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
                # Autocast on CUDA normalises in fp32; tensors without data are cast by the CPU's rules, which do not.
                module.register_forward_pre_hook(_to_fp32)
        networks: FullCopies | SharedBase
        if isinstance(kind, Lora):
            networks, models = SharedBase(model.to(dtype), kind, roles, two_times, critic), [model]
        else:
            networks = FullCopies(model, kind, dtype, roles, two_times, critic)
            models = list(networks._models.values())
        return networks, models if networks._head is None else [*models, networks._head]


def without_data(model: nn.Module) -> None:
    """Turn a model on the meta device into one on the CPU that holds no data; only in a FakeTensorMode.

    The meta device has neither autocast nor attention without its (tokens, tokens) matrix. Parameters stay the same
    objects, for networks that have listed them.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            shape, dtype, learns = parameter.shape, parameter.dtype, parameter.requires_grad
            empty = torch.empty(shape, dtype=dtype, requires_grad=learns)
            torch.utils.swap_tensors(parameter, empty)  # type: ignore[no-untyped-call]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


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
    turn.loss(nets, Batch(x, cond, Draw(0, "plan", range(1)), Real(x, cond)))
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


def _parameters(geometry: Geometry) -> int:
    with torch.device("meta"):
        return _count(SD3Transformer2DModel.from_config(geometry.transformer))


def _text_parameters(geometry: Geometry) -> int:
    with torch.device("meta"):
        return sum(
            _count(
                T5EncoderModel(T5Config(**config))
                if name == "text_encoder_3"
                else CLIPTextModelWithProjection(CLIPTextConfig(**config))
            )
            for name, config in geometry.text.items()
        )


def _moments(tensor: Tensor) -> int:
    """Bytes of Adam's two moments; its step counts are on the host."""
    return 2 * tensor.nbytes


def _moments_8bit(tensor: Tensor) -> int:
    """The same in bitsandbytes' form: a byte for each number and a scale for each block; small tensors stay in fp32."""
    if tensor.numel() < _QUANTISED:
        return 2 * 4 * tensor.numel()
    return 2 * (tensor.numel() + 4 * -(-tensor.numel() // _BLOCK))


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
