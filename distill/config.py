"""`RunConfig`, the typed configuration of a distillation run, and its reader: presets, YAML files and overrides."""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from distill import methods
from distill.config_group import ConfigGroup
from distill.errors import CheckpointError, ConfigError

PRESETS = Path(__file__).parent / "presets"
_KINDS = {"method": "name", "networks": "kind"}  # groups with several kinds, and the key that names the kind
_Group = TypeVar("_Group", bound=ConfigGroup)
_Positive = Annotated[float, Field(gt=0)]
_Path = Annotated[str, AfterValidator(os.path.expanduser)]  # a path, where ~ is the home folder, or another name
_Decay = Annotated[float, Field(ge=0, lt=1)]
_Count = Annotated[int, Field(ge=1, lt=2**63)]
# The name of a student, which its folder, its card and a server's requests have.
_Name = Annotated[str, AfterValidator(lambda name: check_name(name))]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


def check_name(name: str) -> str:
    """Return a student's name. Raises ValueError for one that servers would refuse."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("a name has at most 64 letters, digits and . _ -, and begins with a letter or digit")
    return name


class Prompts(ConfigGroup):
    """The source of prompts: `scenes`, a file, or a folder as in docs/data.md; at most `max_count` prompts.

    `column` is the column of the prompts, if it is not `prompt`, `caption` or `text`. `encoding` is `cached`, once
    before training, or `online`, during training; `auto` is `cached` where the cache is small enough for memory.
    """

    source: _Path = "scenes"
    column: str | None = None
    max_count: _Count = 20_000
    seed: Seed = 0
    encoding: Literal["auto", "online", "cached"] = "auto"
    # T5 tokens of a prompt, up to diffusers' limit; null is the teacher's own number, 256 for the published models.
    max_sequence_length: Annotated[int, Field(ge=0, le=512)] | None = None
    t5: Literal["full", "int8"] = "full"  # precision of T5's weights in online encoding
    encoder_device: str | None = None  # of the text encoders in online encoding; null is the training device


class RealImages(ConfigGroup):
    """The source of real images with captions, for methods that use them.

    `scenes`, a folder of images or of WebDataset shards, or a cache that `distill encode` made; its first `max_count`.
    `column` is the key of captions in JSON, if it is not `prompt`, `caption` or `text`.
    """

    source: _Path
    max_count: _Count | None = None
    seed: Seed = 0  # of `scenes`
    column: str | None = None


class _Networks(ConfigGroup):
    """How the networks are computed. A run may be resumed with other values: only rounding differs.

    `gradient_checkpointing` recomputes each block in the backward pass. `compile` compiles each block; `auto` does
    so on GPUs, if there is a C compiler. `attention` names the kernel: `auto` is `math`, two matrix products and a
    softmax, for bf16 on CPUs, where the backward of PyTorch's fused kernel is slow, and elsewhere `sdpa`, which leaves
    the choice to PyTorch. `cuda_graph` runs a whole round of updates as one CUDA graph; `auto` does so for models whose
    kernels are shorter than their launches.
    """

    gradient_checkpointing: bool = False
    compile: bool | Literal["auto"] = False
    attention: Literal["auto", "sdpa", "math", "flash", "cudnn", "xformers"] = "auto"
    cuda_graph: bool | Literal["auto"] = "auto"


class Full(_Networks):
    """Fake and student are full copies of the teacher, in fp32."""

    kind: Literal["full"] = "full"


class Lora(_Networks):
    """Fake and student are LoRA adapters, in fp32, on one frozen copy of the teacher."""

    kind: Literal["lora"] = "lora"
    rank: _Count = 64
    alpha: _Positive = 64
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "net.0.proj", "net.2",
    )  # fmt: skip


class Optimizer(ConfigGroup):
    """Adam for both roles. Learning rates rise over `warmup_images` and fall to 0 over the last `decay_images`.

    `adam-8bit` (bitsandbytes, CUDA only) stores Adam's two moments in 1 byte each instead of 4. A step whose gradient
    is not finite is skipped and counted; more than `max_skipped_steps` in a row end the run.
    """

    kind: Literal["adam", "adam-8bit"] = "adam"
    student_lr: _Positive = 1e-4
    fake_lr: _Positive = 2e-4
    betas: tuple[_Decay, _Decay] = (0.0, 0.999)
    eps: _Positive = 1e-8
    max_grad_norm: _Positive = 1.0
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    warmup_images: Annotated[int, Field(ge=0)] = 2_000
    decay_images: Annotated[int, Field(ge=0)] = 50_000


class Cadence(ConfigGroup):
    """Intervals in images seen, and how many checkpoints are kept. They do not change the result of a run."""

    log: _Count = 1_000
    sample: _Count = 10_000
    checkpoint: _Count = 10_000
    evaluate: _Count = 10_000
    keep_checkpoints: _Count = 2


class EvaluationSettings(ConfigGroup):
    """How students are evaluated; it does not change what they learn, so a run may be resumed with other values.

    `evaluator` is `reference`, which compares with the teacher's own images, `clip`, a dataset with a scorer such as
    `scenes`, `none`, or `auto`: the dataset of the teacher or the prompts, else `reference`. `images` are made of the
    run's first prompts or those of the file `prompts`. `clip` is the folder or hub id of a CLIP model. `metric` decides
    which checkpoint is the best; null is the kernel distance, or the CLIP score of the evaluator `clip`. `references`
    is a folder for the teacher's images that runs share; null is the run's own.
    """

    evaluator: str = "auto"
    images: Annotated[int, Field(ge=2, le=100_000)] = 256
    prompts: _Path | None = None
    teacher_steps: _Count = 28
    clip: _Path | None = None
    metric: Literal["kernel", "frechet", "clip_score"] | None = None
    references: _Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.clip is None and "clip_score" in (self.metric, f"{self.evaluator}_score"):
            raise ValueError("a CLIP score needs a CLIP model; give its folder or hub id as clip")
        if self.evaluator == "clip" and self.metric not in (None, "clip_score"):
            raise ValueError(f"the evaluator clip has no metric {self.metric}; leave metric out, or take reference")
        return self


class RunConfig(ConfigGroup):
    """All that a run depends on."""

    name: _Name | None = None  # of the student; null is that of the teacher with `-one-step`
    teacher: _Path = "scenes"
    teacher_base: _Path | None = None  # the same model as a folder, for what a teacher in a single file lacks
    # Folder of a run (its newest checkpoint) or a student for the initial weights; null takes the teacher's.
    init_from: Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))] | None = None
    prompts: Prompts = Prompts()
    real: RealImages | None = None
    method: Any = Field(default_factory=lambda: methods.config_class("fgm")())
    networks: Annotated[Full | Lora, Field(discriminator="kind")] = Full()
    optimizer: Optimizer = Optimizer()
    images: _Count = 100_000
    batch: _Count = 128
    micro_batch: _Count | None = None  # images in one forward pass; a step sums the gradients of a batch
    sizes: tuple[tuple[_Count, _Count], ...] = ()  # (width, height), sampled per step; empty is the teacher's size
    ema_half_life: Annotated[float, Field(ge=0)] = 20_000  # images after which weights count half in the EMA
    seed: Seed = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    cadence: Cadence = Cadence()
    evaluation: EvaluationSettings = EvaluationSettings()
    early_stopping_patience: _Count | None = None  # evaluations without a better student that end the run
    trackers: tuple[str, ...] = ("tensorboard",)

    @field_validator("method", mode="before")
    @classmethod
    def _validate_method(cls, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, dict):
            raise ValueError("must be a method's name or its settings, such as {name: fgm, alpha: 1}")
        name = value.get("name", "fgm")
        if name not in methods.names():
            raise ValueError(f"no method {name!r}; there are {', '.join(methods.names())}")
        return methods.config_class(name).model_validate(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.images < self.batch:
            raise ValueError(
                f"images {self.images} is less than one batch of {self.batch}; raise images or lower batch"
            )
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}; take a divisor")
        used = any(turn.real for turn in self.method.turns())
        if used and self.real is None:
            raise ValueError(f"real.source: this {self.method.name} needs real images; give their source")
        if self.real is not None and not used:
            raise ValueError(f"real: this {self.method.name} takes no real images; leave the key out")
        if self.real is not None and self.sizes:
            raise ValueError("sizes: real images have the teacher's native size only; leave sizes or real out")
        kernel = self.networks.attention
        if kernel in ("flash", "cudnn", "xformers") and any(turn.forward_mode for turn in self.method.turns()):
            raise ValueError(
                f"networks.attention {kernel} has no forward-mode derivative, which {self.method.name} takes; "
                "take sdpa or math"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for YAML."""
        plain = self.model_dump(mode="json", exclude={"method"})
        return {**plain, "method": self.method.model_dump(mode="json")}

    def identity(self) -> dict[str, Any]:
        """The keys, flat, in which a checkpoint and a run that resumes it must agree; not budget, cadence or trackers.

        The teacher may be moved; its digest in `sources.json` identifies it.
        """
        free = {"cadence", "early_stopping_patience", "evaluation", "images", "micro_batch", "name", "trackers"}
        free |= {"teacher", "teacher_base"}
        plain = {key: value for key, value in self.as_dict().items() if key not in free}
        for key in _Networks.model_fields:
            plain["networks"].pop(key)
        plain["prompts"].pop("encoder_device")
        return dict(flat(plain))

    def check_same(self, identity: Mapping[str, Any], where: Path) -> None:
        """Raise CheckpointError, naming the first key, unless `identity`, read from `where`, is this run's."""
        for key, value in json.loads(json.dumps(self.identity())).items():
            if identity.get(key) != value:
                raise CheckpointError(
                    f"{where} was made with {key} = {identity.get(key)}, not {value}; "
                    "set it back, or give another --out folder"
                )


def is_preset(name: str) -> bool:
    """Whether `load_config` takes the name: a preset, or a YAML file."""
    return name.endswith((".yaml", ".yml")) or (PRESETS / f"{name}.yaml").exists()


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a preset or YAML file, with `a.b=value` overrides. Raises ConfigError naming the preset, file or key."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.exists():
        known = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
        raise ConfigError(f"no preset or file {name!r}{_nearest(name, known)}; presets are {', '.join(known)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a preset or a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}; correct it there") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(values).__name__}; write it like the presets")
    for group, tag in _KINDS.items():
        if isinstance(values.get(group), str):
            values[group] = {tag: values[group]}
    _apply(values, overrides)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def changes(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """The dotted keys whose values differ from those of another configuration, with their new values."""
    old, new = (dict(flat(config.as_dict())) for config in (before, after))
    return {key: value for key, value in new.items() if key not in old or old[key] != value}


def read_group(kind: type[_Group], overrides: Sequence[str]) -> _Group:
    """Read a group of settings from `key=value` overrides of its defaults. Raises ConfigError naming the key."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, value = parse_override(override)
        _put(values, key.split("."), value, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "[key]"]
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"unknown key {where[-1]!r}{_nearest(where[-1], list(kind.model_fields))}") from error
        raise ConfigError(_sentence(first, where)) from error


def parse_override(override: str) -> tuple[str, Any]:
    """Read `key=value`, where the value is YAML. Raises ConfigError for anything else."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write it as key=value, for example --set optimizer.student_lr=1e-4")
    try:
        value = text if text in ("", "-") else yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"--set {override}: the value is not YAML; put quotes around a text") from None
    if isinstance(value, str) and value == text.strip():  # YAML 1.1 reads 1e-4 as a string
        with suppress(ValueError):
            return key, float(value)
    return key, value


def _apply(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set each key to its last value. Kinds are set first, so keys of a kind may be given before it."""
    given: dict[str, tuple[Any, str]] = {}
    for override in overrides:
        key, value = parse_override(override)
        if key in _KINDS and isinstance(value, str):  # method=dmd is short for method.name=dmd
            key = f"{key}.{_KINDS[key]}"
        given.pop(key, None)
        given[key] = value, override
    tags = {f"{group}.{tag}": group for group, tag in _KINDS.items()}
    for key in sorted(given, key=lambda key: key not in _KINDS and key not in tags):
        value, override = given[key]
        if key in tags:
            _choose(values, tags[key], value)
        _put(values, key.split("."), value, override)


def _choose(values: dict[str, Any], group: str, kind: Any) -> None:
    """Drop the settings of another kind from a group, except those that both kinds share.

    The shared settings are the guidance of methods, which belongs to the teacher, and how networks compute. Raises
    ConfigError for a method that does not exist.
    """
    own = values.get(group)
    if not isinstance(own, dict):
        return
    if group == "networks":
        if own.get("kind", "full") != kind:
            values[group] = {name: value for name, value in own.items() if name in _Networks.model_fields}
        return
    if kind not in methods.names():
        near = _nearest(str(kind), methods.names())
        raise ConfigError(f"no method {kind!r}{near}; there are {', '.join(methods.names())}")
    if own.get("name", "fgm") != kind:
        guidance = own.get("guidance")
        if isinstance(guidance, dict):  # a method without a fake has no guidance of one
            known = methods.config_class(kind).model_fields["guidance"].annotation.model_fields
            guidance = {name: value for name, value in guidance.items() if name in known}
        values[group] = {} if guidance is None else {"guidance": guidance}


def _put(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {key!r} has no keys of its own; set its value")
    values[keys[-1]] = value


def _explain(error: ValidationError) -> str:
    """Turn a pydantic error into a sentence; of a union's members, that of the deepest key."""
    first = max(error.errors(), key=lambda each: len(each["loc"]))
    where = _keys_of(first["loc"])
    if first["type"] == "extra_forbidden":
        where = [*_keys_of(first["loc"][:-1]), str(first["loc"][-1])]
        if where[-1] in _keys_beside(where):
            return f"{'.'.join(where)} belongs to another kind of {where[0]}; leave it out, or choose that kind"
        return f"unknown key {'.'.join(where)!r}{_nearest(where[-1], _keys_beside(where))}"
    kinds = " or ".join(kind.model_fields["kind"].default for kind in (Full, Lora))
    if first["type"] == "union_tag_not_found":
        return f"networks.kind is missing; with other keys of networks, set it to {kinds}"
    if first["type"] == "union_tag_invalid":
        return f"networks.kind: there is no {first['input']['kind']!r}; take {kinds}"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{'.'.join(where)} holds keys of its own, {', '.join(_keys_beside([*where, '']))}; set one of them"
    return _sentence(first, where)


def _sentence(error: Any, where: Sequence[str]) -> str:
    """One of pydantic's errors as a sentence about a key."""
    given = f", not {error['input']!r}" if where and not isinstance(error["input"], dict) else ""
    return f"{'.'.join(where) or 'configuration'}: {error['msg'].removeprefix('Value error, ')}{given}"


def _keys_of(place: Sequence[int | str]) -> list[str]:
    """The keys in the path of a pydantic error, without the names of union members."""
    keys: list[str] = []
    for part in place:
        if isinstance(part, int) or part in _keys_beside([*keys, part]):
            keys.append(str(part))
    return keys


def _keys_beside(where: Sequence[str]) -> list[str]:
    """The keys that are valid in place of a key."""
    models: list[Any] = [RunConfig]
    for field in where[:-1]:
        models = [kind for model in models for kind in _models_of(model, field)]
    return sorted({name for model in models for name in model.model_fields})


def _models_of(model: Any, field: str) -> list[Any]:
    if (model, field) == (RunConfig, "method"):
        return [methods.config_class(name) for name in methods.names()]
    if field not in model.model_fields:
        return []
    annotation = model.model_fields[field].annotation
    kinds = get_args(annotation) or (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries with their dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
