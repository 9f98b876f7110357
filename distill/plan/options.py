"""The input of `distill plan`: the configuration of a run or of a teacher alone; and options that fit a device."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from distill import presets
from distill.config import Full, Lora, RunConfig, make_config
from distill.data.shard_reader import RESIDENT_BYTES
from distill.models.geometry import Geometry
from distill.plan.estimate import Plan, PlanInput


def teacher_config(geometry: Geometry, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration that a teacher without a preset is planned with: defaults, and `overrides` of them.

    The method is that of the model's own preset, or of SD3-medium's.
    """
    values = {
        "method": presets.read(f"{geometry.published or 'sd3-medium'}-lora")["method"],
        "prompts": {"max_count": 1_000_000},
        "networks": {"kind": "lora"},
        "images": 1_000_000,
        "batch": 1,
        "precision": "bf16",
    }
    return make_config(values, overrides)


def run_input(geometry: Geometry, config: RunConfig, batch: int | None = None, size: int | None = None) -> PlanInput:
    """Build the input of a run's configuration. The batch is `micro_batch`, the size the largest of `sizes`.

    `size` is the side of a square; another shape counts as the square of its area. Raises ConfigError for blocks that
    the model lacks.
    """
    config.method.guidance.check_layers(geometry.transformer["num_layers"])
    if size is None and config.sizes:
        unit = geometry.pixels_per_latent * int(geometry.transformer["patch_size"])
        size = unit * math.ceil(math.sqrt(max(width * height for width, height in config.sizes)) / unit)
    if config.prompts.max_sequence_length is not None:
        geometry = geometry.with_text(geometry.clip_tokens, config.prompts.max_sequence_length)
    precision = torch.float32 if config.precision == "fp32" else torch.bfloat16
    made = PlanInput(
        geometry,
        config.networks,
        precision,
        batch or config.micro_batch or config.batch,
        size or geometry.image_size,
        config.method,
        config.optimizer.kind,
    )
    encoded = config.prompts.max_count * made.prompt_bytes * torch.bfloat16.itemsize // precision.itemsize
    encoding = config.prompts.encoding
    online = encoding == "online" or (encoding == "auto" and encoded > RESIDENT_BYTES)
    apart = config.prompts.encoder_device is not None
    return replace(made, online=online, encoders_apart=apart, t5=config.prompts.t5)


def changes_that_fit(made: PlanInput, plan: Plan, available: int) -> list[str]:
    """List options with which the peak is at most `available` bytes: single ones, or all together if none is enough.

    Empty if all together are not enough.
    """
    kind = made.kind
    found = []
    if not kind.gradient_checkpointing:
        checkpointed = replace(made, kind=kind.model_copy(update={"gradient_checkpointing": True}))
        if checkpointed.plan().peak <= available:
            found.append("--gradient-checkpointing")
    # Optimizer states are held in every stage but the start, before the networks are loaded.
    saved = plan.optimizer_states[made.optimizer] - plan.optimizer_states["adam-8bit"]
    if saved and max(plan.stages["start"], plan.peak - saved) <= available:
        found.append("--optimizer adam-8bit")
    # At the start, the text encoders are whole and on the device in any case.
    others = {
        "prompts.t5=int8": replace(made, t5="int8"),
        "prompts.encoder_device=cpu": replace(made, encoders_apart=True),
        "prompts.encoding=cached": replace(made, online=False),
    }
    for change, other in others.items():
        saved = plan.resident["text encoders"] - other.text_bytes
        if saved and max(plan.stages["start"], plan.peak - saved) <= available:
            found.append(change)
    if isinstance(kind, Full):
        lora = Lora(gradient_checkpointing=kind.gradient_checkpointing)
        if replace(made, kind=lora).plan().peak <= available:
            found.append(f"--mode lora --rank {lora.rank}")
    if made.batch > 1:
        least = replace(made, batch=1).plan().peak
        if least <= available:
            # The peak is convex in the batch (a maximum of linear functions), so the chord overestimates it.
            share = (available - least) / (plan.peak - least)
            found.append(f"--batch {1 + int(share * (made.batch - 1))}")
    if not found and plan.stages["start"] <= available:
        least_kind = (kind if isinstance(kind, Lora) else Lora()).model_copy(update={"gradient_checkpointing": True})
        smallest = replace(made, kind=least_kind, optimizer="adam-8bit", batch=1)
        if smallest.plan().peak <= available:
            mode = f"--mode lora --rank {least_kind.rank} " if isinstance(kind, Full) else ""
            found.append(f"{mode}--gradient-checkpointing --optimizer adam-8bit --batch 1")
    return found
