"""LoRA adapters: merged in place into the weights of a loaded transformer, and removed again bit-exactly.

W' = W + scale B A is computed from the original W whenever the adapter or its scale changes. The network's graph stays
the same, so that no rank needs compilation, and inference with an adapter costs nothing extra. A change costs one pass
over the weights of the adapted layers, whose original copies stay in memory.
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

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name, also used by `distill export`
_PREFIX = "transformer."
_METADATA = "lora_adapter_metadata"  # the key of peft's settings in files of diffusers
_CONFIG = "adapter_config.json"  # peft's own file of settings
# peft settings that need another way to merge, and initializations that change the base weights.
_UNSUPPORTED = ("use_dora", "alpha_pattern", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
                "arrow_config", "alora_invocation_tokens", "target_parameters", "trainable_token_indices",
                "modules_to_save")  # fmt: skip
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda")


@dataclass(frozen=True, eq=False)
class Adapter:
    """The weights of an adapter file: scale * B (out, r) and A (r, in), by module."""

    digest: str
    factors: Mapping[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path | str, transformer: SD3Transformer2DModel) -> Adapter:
    """Read the adapter of a folder, in fp32 on the device of `transformer`, which is not changed.

    The scale is alpha / r, or alpha / sqrt(r) for rsLoRA. Raises TeacherError for a file that is missing or damaged,
    that holds other tensors than LoRA pairs of linear layers, or whose settings are not supported.
    """
    path = Path(folder) / FILE
    try:
        config_path = path.with_name(_CONFIG)
        config = config_path.read_bytes() if config_path.exists() else b""
        digest = hashlib.sha256(path.read_bytes() + config).hexdigest()
        with safe_open(path, framework="pt") as file:
            settings = _settings((file.metadata() or {}).get(_METADATA) or config or "{}")
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise TeacherError(f"{path} is missing or damaged: {error}; download or export it again") from error
    other = next((name for name in _UNSUPPORTED if settings.get(name)), None)
    if other is None and str(settings.get("init_lora_weights")).startswith(_CHANGED_BASE):
        other = f"init_lora_weights {settings['init_lora_weights']}"
    if other is not None:
        raise TeacherError(f"{path} was trained with {other}; only plain LoRA and rsLoRA adapters are supported")
    if (bad := first_nonfinite(tensors)) is not None:
        raise TeacherError(f"{path} is damaged: {bad} is not finite; download or export it again")
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
            raise TeacherError(f"{path} is damaged: its alpha is not finite; download or export it again")
        factors[module] = (scale * b).to(linear.weight.device), a.to(linear.weight.device)
    if tensors or not factors:
        raise TeacherError(f"{path} holds {next(iter(tensors), 'nothing')}; only LoRA pairs of a transformer fit")
    return Adapter(digest, factors)


def _settings(text: str | bytes) -> dict[str, Any]:
    """Parse peft's settings of an adapter from JSON. Raises ValueError."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("its settings are not a JSON object")
    settings = {str(name).removeprefix(_PREFIX): value for name, value in values.items()}
    if not isinstance(settings.get("lora_alpha", 1), int | float):
        raise ValueError(f"lora_alpha is {settings['lora_alpha']!r}, not a number")
    return settings


class Merger:
    """Merges adapters into one transformer, one at a time. Use it only from the thread that runs the transformer."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        self._transformer = transformer
        self._original: dict[str, Tensor] = {}
        self._merged: tuple[Adapter | None, float] | None = None, 0.0  # None while weights change

    @torch.no_grad()
    def merge(self, adapter: Adapter | None, scale: float = 1.0) -> None:
        """Merge an adapter, or restore the original weights for None. Earlier merges have no effect on the result."""
        if self._merged == (adapter, scale):
            return
        self._merged = None
        factors = {} if adapter is None else adapter.factors
        for name in self._original.keys() | factors.keys():
            weight = self._transformer.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            original = self._original.setdefault(name, weight.clone())
            if name in factors:
                b, a = factors[name]
                weight.copy_(original.float() + scale * (b @ a))
            else:
                weight.copy_(original)
        self._merged = adapter, scale
