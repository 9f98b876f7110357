"""`RunConfig`, the configuration of a distillation run, in groups of settings."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from distill import methods, presets
from distill.config_group import ConfigGroup
from distill.errors import CheckpointError
from distill.methods.base import TrainedNetworks


def _check_name(name: str) -> str:
    """Return a student's name. Raises ValueError for one that servers would refuse."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("a name has at most 64 letters, digits and . _ -, and begins with a letter or digit")
    return name


def _expand_path(path: str) -> str:
    """Return a path without ~. Raises ValueError for an empty one, which is read as the current folder."""
    if not path:
        raise ValueError("must name a file, a folder or a model")
    return os.path.expanduser(path)


_Positive = Annotated[float, Field(gt=0)]
_Path = Annotated[str, AfterValidator(_expand_path)]  # a path, where ~ is the home folder, or another name
_Decay = Annotated[float, Field(ge=0, lt=1)]
_Count = Annotated[int, Field(ge=1, lt=2**63)]
_Name = Annotated[str, AfterValidator(_check_name)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


class Prompts(ConfigGroup):
    """Where prompts come from and how they are encoded.

    `source` is `scenes`, `scenes-hard`, a file, a folder of files, or a cache of `distill embed` (docs/data.md). A run
    uses at most `max_count` prompts. `column` names their column, if it is not `prompt`, `caption` or `text`.
    `encoding` is `cached` (once, before training) or `online` (during training); `auto` is `cached` if the cache fits
    into memory.
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
    """Where real images with captions come from, for methods that use them.

    `source` is `scenes`, a folder of images or of WebDataset shards, or a cache of `distill encode`. A run uses its
    first `max_count` images. `column` is the key of captions in JSON, if it is not `prompt`, `caption` or `text`.
    """

    source: _Path
    max_count: _Count | None = None
    seed: Seed = 0  # of `scenes`
    column: str | None = None


class NetworkSettings(ConfigGroup):
    """How the networks are computed. A run may be resumed with other values, which change only rounding.

    `gradient_checkpointing` recomputes each block in the backward pass. `compile` compiles each block; `auto` does so
    on GPUs if there is a C compiler. `attention` names the kernel: `sdpa` leaves the choice to PyTorch, and `math` is
    two matrix products and a softmax. `auto` is `math` for bf16 on CPUs, where the backward pass of PyTorch's fused
    kernel is slow, and `sdpa` elsewhere. `cuda_graph` runs a whole round of updates as one CUDA graph; `auto` does so
    for small models, whose kernels take less time than their launches.
    """

    gradient_checkpointing: bool = False
    compile: bool | Literal["auto"] = False
    attention: Literal["auto", "sdpa", "math", "flash", "cudnn", "xformers"] = "auto"
    cuda_graph: bool | Literal["auto"] = "auto"


class Full(NetworkSettings):
    """Fake and student are full copies of the teacher, in fp32."""

    kind: Literal["full"] = "full"


class Lora(NetworkSettings):
    """Fake and student are LoRA adapters, in fp32, on one frozen copy of the teacher.

    The default targets are all linear layers. Those of modulation (`linear`) and of the embeddings make a third of the
    change of a full student (docs/results.md); diffusers' script for LCM-LoRA adapts modulation too.
    """

    kind: Literal["lora"] = "lora"
    rank: _Count = 64
    alpha: _Positive = 64
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "net.0.proj", "net.2", "linear", "linear_1", "linear_2", "context_embedder", "proj_out",
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
    """Intervals in training images, and the number of checkpoints that are kept. The result of a run is the same."""

    log: _Count = 1_000
    sample: _Count = 10_000
    checkpoint: _Count = 10_000
    evaluate: _Count = 10_000
    keep_checkpoints: _Count = 2


class EvaluationSettings(ConfigGroup):
    """How students are evaluated. This does not change what they learn, so a run may be resumed with other values.

    `evaluator` is `reference` (compares with the teacher's own images), `clip`, a dataset with a scorer such as
    `scenes`, or `none`. `auto` is the dataset of the teacher or the prompts, or else `reference`. An evaluation
    generates `images` images of the run's first prompts, or of the prompts in the file `prompts`. `clip` is the folder
    or hub id of a CLIP model. `metric` selects the best checkpoint; null is the kernel distance, or the CLIP score of
    the evaluator `clip`. `references` is a folder for the teacher's images that runs can share; null is the run's own.
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
    """The configuration of a distillation run; docs/distill.md explains each key."""

    name: _Name | None = None  # of the student; null is that of the teacher with `-one-step`
    teacher: _Path = "scenes"
    teacher_base: _Path | None = None  # the same model as a folder, for what a teacher in a single file lacks
    # Folder of a run (its newest checkpoint) or a student for the initial weights; null takes the teacher's.
    init_from: Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))] | None = None
    prompts: Prompts = Prompts()
    real: RealImages | None = None
    method: Any = Field(default_factory=lambda: methods.config_class(presets.METHOD)())
    networks: Annotated[Full | Lora, Field(discriminator="kind")] = Full()
    optimizer: Optimizer = Optimizer()
    images: _Count = presets.IMAGES
    batch: _Count = presets.BATCH
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
        name = value.get("name", presets.METHOD)
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
        used = any(phase.real for phase in self.method.update_phases())
        if used and self.real is None:
            raise ValueError(f"real.source: this {self.method.name} needs real images; give their source")
        if self.real is not None and not used:
            raise ValueError(f"real: this {self.method.name} takes no real images; leave the key out")
        if self.real is not None and self.sizes:
            raise ValueError("sizes: real images have the teacher's native size only; leave sizes or real out")
        kernel = self.networks.attention
        if kernel in ("flash", "cudnn", "xformers") and any(
            phase.forward_mode for phase in self.method.update_phases()
        ):
            raise ValueError(
                f"networks.attention {kernel} has no forward-mode derivative, which {self.method.name} takes; "
                "take sdpa or math"
            )
        return self

    @property
    def trained(self) -> TrainedNetworks:
        """The networks that the run trains."""
        return TrainedNetworks.of(self.method.update_phases())

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
        for key in NetworkSettings.model_fields:
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


def changes(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """The dotted keys whose values differ from those of another configuration, with their new values."""
    old, new = (dict(flat(config.as_dict())) for config in (before, after))
    return {key: value for key, value in new.items() if key not in old or old[key] != value}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries with their dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
