"""`DistillationOptions`: the preset of a job, and what is changed in it."""

import json
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from service.schemas import RequestModel

MAX_COUNT = 10**10
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]

KEYS = {
    "method": "method.name",
    "max_prompts": "prompts.max_count",
    "column": "prompts.column",
    "guidance_scale": "method.guidance.scale",
    "student_lr": "optimizer.student_lr",
    "fake_lr": "optimizer.fake_lr",
    "warmup_images": "optimizer.warmup_images",
    "decay_images": "optimizer.decay_images",
    "log_every": "cadence.log",
    "sample_every": "cadence.sample",
    "checkpoint_every": "cadence.checkpoint",
    "evaluate_every": "cadence.evaluate",
    "evaluation_images": "evaluation.images",
    "rank": "networks.rank",
    "gradient_checkpointing": "networks.gradient_checkpointing",
}  # of fields whose key in the configuration of a run is another one
FLAGS = {"preset", "seconds"}  # fields that `distill run` takes as arguments of their own


class DistillationOptions(RequestModel):
    """The `distillation` object of a job. None keeps the value of the preset."""

    preset: Annotated[_Name | None, Field(description="Of `distill run`; `scenes` if not given, for that teacher.")] = (
        None
    )
    method: Annotated[_Name | None, Field(description="Replaces the preset's method: fgm, dmd, ...")] = None
    networks: Annotated[Literal["lora", "full"] | None, Field(description="Adapters on one base, or full copies.")] = (
        None
    )
    rank: Annotated[Count | None, Field(description="Of the adapters.")] = None
    gradient_checkpointing: Annotated[bool | None, Field(description="Recompute blocks in the backward pass.")] = None
    images: Annotated[Count | None, Field(description="Budget in training samples.")] = None
    seconds: Annotated[float | None, Field(ge=1, le=10**8, description="Budget in seconds, instead of images.")] = None
    max_prompts: Annotated[Count, Field(description="Maximum number of prompts of the training file.")] = 1_000_000
    column: Annotated[
        str | None,
        Field(
            max_length=256,
            pattern=r"^[^\x00]*$",
            description="Column of the prompts in the file, if it is not prompt, caption or text.",
        ),
    ] = None
    batch: Annotated[Count | None, Field(description="Images of a step.")] = None
    micro_batch: Annotated[Count | None, Field(description="Images of one forward pass.")] = None
    guidance_scale: Annotated[float | None, Field(ge=1, le=100, description="Of the teacher.")] = None
    student_lr: Annotated[_Rate | None, Field(description="Learning rate of the student.")] = None
    fake_lr: Annotated[_Rate | None, Field(description="Learning rate of the auxiliary network.")] = None
    warmup_images: Annotated[
        int | None, Field(ge=0, le=MAX_COUNT, description="Images until the learning rates have their values.")
    ] = None
    decay_images: Annotated[
        int | None, Field(ge=0, le=MAX_COUNT, description="Last images, over which the learning rates fall.")
    ] = None
    ema_half_life: Annotated[float | None, Field(ge=0, le=MAX_COUNT, description="Of the average, in images.")] = None
    precision: Annotated[Literal["auto", "fp32", "bf16"] | None, Field(description="Of the training.")] = None
    sizes: Annotated[
        list[Annotated[list[Count], Field(min_length=2, max_length=2)]] | None,
        Field(min_length=1, max_length=64, description="[width, height] of the images, drawn at random."),
    ] = None
    early_stopping_patience: Annotated[
        Count | None, Field(description="Evaluations without a better student after which the run ends.")
    ] = None
    evaluation_images: Annotated[
        int | None, Field(ge=2, le=100_000, description="Images of an evaluation against the teacher's, or by CLIP.")
    ] = None
    log_every: Annotated[Count | None, Field(description="In images, as all fields that follow.")] = None
    sample_every: Count | None = None
    checkpoint_every: Count | None = None
    evaluate_every: Count | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.images is not None and self.seconds is not None:
            raise ValueError("images and seconds are both given; give one of them")
        return self

    def overrides(self) -> list[str]:
        """Return the changes as arguments of `--set`."""
        given = self.model_dump(exclude_none=True, exclude=FLAGS)
        if "networks" in given:  # replaces the whole object, which may be of the other kind
            parts = {name: given.pop(name) for name in ("rank", "gradient_checkpointing") if name in given}
            given["networks"] = {"kind": given["networks"], **parts}
        return [f"{KEYS.get(name, name)}={json.dumps(value)}" for name, value in given.items()]
