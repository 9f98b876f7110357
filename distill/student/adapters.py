"""LoRA adapters on a transformer at work: merged into its weights in place, and taken out again to the bit.

W' = W + scale B A is computed from the untouched W whenever the adapter or its scale changes. The network's graph stays
the same, so nothing is compiled again, whatever the rank, and an image pays nothing for an adapter. A change costs one
pass over the weights that the adapter touches; untouched copies of those stay beside the transformer.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.errors import TeacherError
from distill.models.weights import first_nonfinite

FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it, and `distill export` beside a merged student
_PREFIX = "transformer."
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings
_CONFIG = "adapter_config.json"  # where peft keeps them
# Settings of peft that need another merge, and its initializations that change the base weights.
_OTHERS = ("use_dora", "alpha_pattern", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "arrow_config",
           "alora_invocation_tokens", "target_parameters", "trainable_token_indices", "modules_to_save")  # fmt: skip
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda")


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a file adds to a transformer. `factors` hold scale * B (out, r) and A (r, in), by module."""

    digest: str
    factors: Mapping[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path | str, transformer: SD3Transformer2DModel) -> Adapter:
    """The adapter of a folder, fp32 on the transformer's device. Changes nothing of the transformer.

    The scale is alpha / r, or alpha / sqrt(r) for rsLoRA. Raises TeacherError for a file that is missing or damaged,
    that holds anything but pairs for linear layers, or whose settings need another kind of merge.
    """
    path = Path(folder) / FILE
    try:
        beside = path.with_name(_CONFIG)
        config = beside.read_bytes() if beside.exists() else b""
        digest = hashlib.sha256(path.read_bytes() + config).hexdigest()
        with safe_open(path, framework="pt") as file:
            settings = _settings((file.metadata() or {}).get(_METADATA) or config or "{}")
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise TeacherError(f"{path} is missing or damaged: {error}; fetch or export it again") from error
    other = next((name for name in _OTHERS if settings.get(name)), None)
    if other is None and str(settings.get("init_lora_weights")).startswith(_CHANGED_BASE):
        other = f"init_lora_weights {settings['init_lora_weights']}"
    if other is not None:
        raise TeacherError(f"{path} was trained with {other}; only plain LoRA and rsLoRA adapters are taken")
    if (bad := first_nonfinite(tensors)) is not None:
        raise TeacherError(f"{path} is damaged: {bad} is not finite; fetch or export it again")
    factors = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        module = stem.removeprefix(_PREFIX)
        a, b = tensors.pop(name), tensors.pop(f"{stem}.lora_B.weight", None)
        alpha = tensors.pop(f"{stem}.alpha", None)
        try:
            linear = transformer.get_submodule(module)
        except AttributeError:
            raise TeacherError(f"{path} is for another transformer: there is no {module} in this one") from None
        if b is None or not isinstance(linear, nn.Linear) or linear.weight.shape != (len(b), a.shape[1]):
            raise TeacherError(f"{path} is for another transformer: {module} is not a linear layer of its shape")
        divisor = math.sqrt(len(a)) if settings.get("use_rslora") else len(a)
        scale = float(alpha) / len(a) if alpha is not None else settings.get("lora_alpha", divisor) / divisor
        if not math.isfinite(scale):
            raise TeacherError(f"{path} is damaged: its alpha is not finite; fetch or export it again")
        factors[module] = (scale * b).to(linear.weight.device), a.to(linear.weight.device)
    if tensors or not factors:
        raise TeacherError(f"{path} holds {next(iter(tensors), 'nothing')}; only pairs for a transformer are taken")
    return Adapter(digest, factors)


def _settings(text: str | bytes) -> dict[str, Any]:
    """Parse peft's settings of an adapter from JSON. Raises ValueError."""
    told = json.loads(text)
    if not isinstance(told, dict):
        raise ValueError("its settings are not a JSON object")
    settings = {str(name).removeprefix(_PREFIX): value for name, value in told.items()}
    if not isinstance(settings.get("lora_alpha", 1), int | float):
        raise ValueError(f"lora_alpha is {settings['lora_alpha']!r}, not a number")
    return settings


class Merger:
    """The weights of one transformer, with one adapter or none. Of the thread that runs the transformer."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        self._transformer = transformer
        self._untouched: dict[str, Tensor] = {}
        self._merged: tuple[Adapter | None, float] | None = None, 0.0  # None while it changes

    @torch.no_grad()
    def merge(self, adapter: Adapter | None, scale: float = 1.0) -> None:
        """Have the weights be those of an adapter, or untouched; they depend on nothing that was merged before."""
        if self._merged == (adapter, scale):
            return
        self._merged = None
        factors = {} if adapter is None else adapter.factors
        for name in self._untouched.keys() | factors.keys():
            weight = self._transformer.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            untouched = self._untouched.setdefault(name, weight.clone())
            if name in factors:
                b, a = factors[name]
                weight.copy_(untouched.float() + scale * (b @ a))
            else:
                weight.copy_(untouched)
        self._merged = adapter, scale
