"""What a distillation job may ask for, and the `distill run` that does it."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.errors import NotFound, quoted
from service.settings import SHIPPED_TEACHER

_Count = Annotated[int, Field(ge=1, le=10**10)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]

DISTILL = (sys.executable, "-m", "distill.cli")
KEYS = {
    "images": "images",
    "max_prompts": "prompts.max_count",
    "column": "prompts.column",
    "batch": "batch",
    "micro_batch": "micro_batch",
    "guidance_scale": "method.guidance.scale",
    "student_lr": "optimizer.student_lr",
    "fake_lr": "optimizer.fake_lr",
    "warmup_images": "optimizer.warmup_images",
    "decay_images": "optimizer.decay_images",
    "ema_half_life": "ema_half_life",
    "precision": "precision",
    "sizes": "sizes",
    "early_stopping_patience": "early_stopping_patience",
    "log_every": "cadence.log",
    "sample_every": "cadence.sample",
    "checkpoint_every": "cadence.checkpoint",
    "evaluate_every": "cadence.evaluate",
}  # of what is given as it is: our name, and the key in a run's configuration


class DistillationOptions(BaseModel):
    """The `distillation` object of a job: a preset, and what is changed in it. None leaves what the preset says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    preset: Annotated[_Name | None, Field(description="As `distill run` knows it; `scenes` for that teacher.")] = None
    method: Annotated[_Name | None, Field(description="In place of the preset's: fgm, dmd, ...")] = None
    networks: Annotated[Literal["lora", "full"] | None, Field(description="Adapters on one base, or copies.")] = None
    rank: Annotated[_Count | None, Field(description="Of the adapters.")] = None
    gradient_checkpointing: Annotated[bool | None, Field(description="Compute blocks again in the backward.")] = None
    images: Annotated[_Count | None, Field(description="Budget in images seen.")] = None
    seconds: Annotated[float | None, Field(ge=1, le=10**8, description="Budget in seconds of training instead.")] = None
    max_prompts: Annotated[_Count, Field(description="Prompts of the training file at most.")] = 1_000_000
    column: Annotated[
        str | None,
        Field(max_length=256, description="Column of the prompts in the file, if it is not prompt, caption or text."),
    ] = None
    batch: _Count | None = None
    micro_batch: _Count | None = None
    guidance_scale: Annotated[float | None, Field(ge=1, le=100, description="Of the teacher.")] = None
    student_lr: _Rate | None = None
    fake_lr: _Rate | None = None
    warmup_images: Annotated[int | None, Field(ge=0, le=10**10)] = None
    decay_images: Annotated[int | None, Field(ge=0, le=10**10)] = None
    ema_half_life: Annotated[float | None, Field(ge=0, le=10**10, description="In images.")] = None
    precision: Literal["auto", "fp32", "bf16"] | None = None
    sizes: Annotated[
        list[Annotated[list[_Count], Field(min_length=2, max_length=2)]] | None,
        Field(min_length=1, max_length=64, description="[width, height] to draw from."),
    ] = None
    early_stopping_patience: Annotated[
        _Count | None, Field(description="Evaluations without a better student that end it.")
    ] = None
    log_every: Annotated[_Count | None, Field(description="In images, as all that follow.")] = None
    sample_every: _Count | None = None
    checkpoint_every: _Count | None = None
    evaluate_every: _Count | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.images is not None and self.seconds is not None:
            raise ValueError("images and seconds are both given; give one, the other follows from it")
        return self

    @model_validator(mode="after")
    def _a_preset_not_a_file(self) -> Self:
        if self.preset is not None and self.preset.endswith((".yaml", ".yml")):
            raise ValueError("preset: name one of `distill run`, not a file")
        return self

    def overrides(self) -> list[str]:
        """What is changed, as `--set` takes it."""
        given = self.model_dump(exclude_none=True)
        sets = {key: given[name] for name, key in KEYS.items() if name in given}
        networks = {name: given[name] for name in ("rank", "gradient_checkpointing") if name in given}
        if "networks" in given:  # as a whole, so that nothing of the other kind is left
            sets["networks"] = {"kind": given["networks"], **networks}
        else:
            sets |= {f"networks.{name}": value for name, value in networks.items()}
        return [f"{key}={json.dumps(value)}" for key, value in sets.items()]


def find_teacher(teachers: Mapping[str, str], model: str) -> str:
    """What `distill run` takes for the teacher that the server knows by this name. Raises NotFound."""
    teacher = teachers.get(model)
    if teacher is None:
        known = ", ".join(teachers) or "none"
        raise NotFound(f"there is no teacher {quoted(model)}; this server has {known}", "model", "model_not_found")
    if teacher != SHIPPED_TEACHER and not Path(teacher).is_dir():
        raise NotFound(f"the folder of the teacher {model!r} is gone from the server", "model", "model_gone")
    return teacher


def run_command(asked: DistillationOptions, teacher: str, prompts: Path, seed: int, folder: Path) -> list[str]:
    """The `distill run` by this Python. The same command continues it."""
    assert asked.preset is not None
    words = [*DISTILL, "run", asked.preset, "--out", str(folder)]
    if asked.method is not None:
        words += ["--method", asked.method]
    if asked.seconds is not None:
        words += ["--seconds", str(asked.seconds)]
    sets = [f"teacher={json.dumps(teacher)}", f"prompts.source={json.dumps(str(prompts))}", f"seed={seed}"]
    return words + [part for each in (*sets, *asked.overrides()) for part in ("--set", each)]


def prompts_command(asked: DistillationOptions, prompts: Path) -> list[str]:
    """The command that reads a file of prompts to its end, by this Python; it says what is wrong as a run does."""
    column = [] if asked.column is None else [f"--column={asked.column}"]
    return [*DISTILL, "prompts", "stats", str(prompts), *column]
