"""The typed configuration of a distillation run. `reader` reads it, `explanations` words its errors."""

from distill.config.reader import is_preset, load_config, make_config, parse_override, read_group
from distill.config.run_config import (
    Cadence,
    EvaluationSettings,
    Full,
    Lora,
    Optimizer,
    Prompts,
    RealImages,
    RunConfig,
    Seed,
    changes,
    flat,
)

__all__ = [
    "Cadence",
    "EvaluationSettings",
    "Full",
    "Lora",
    "Optimizer",
    "Prompts",
    "RealImages",
    "RunConfig",
    "Seed",
    "changes",
    "flat",
    "is_preset",
    "load_config",
    "make_config",
    "parse_override",
    "read_group",
]
