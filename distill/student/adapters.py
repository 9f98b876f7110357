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
from torch import Tensor

from distill.errors import TeacherError
from distill.models.weights import first_nonfinite
from distill.student.lora_formats import read_pairs

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name, also used by `distill export`; preferred in a folder
_ENDING = ".safetensors"
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


def read_adapter(path: Path | str, transformer: SD3Transformer2DModel) -> Adapter:
    """Read an adapter's file, or that of a folder, in fp32 on the device of `transformer`, which is not changed.

    The scale is alpha / r, or alpha / sqrt(r) for rsLoRA. Raises TeacherError for a file that is missing or damaged,
    that holds other tensors than LoRA pairs of linear layers, or whose settings are not supported.
    """
    path = _find_file(Path(path))
    try:
        config = _config_beside(path)
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
    try:
        pairs = read_pairs(tensors, transformer)
    except ValueError as error:
        raise TeacherError(f"{path} {error}") from None
    if not pairs:
        raise TeacherError(f"{path} holds no LoRA pairs; download or export it again")
    factors = {}
    for module, pair in pairs.items():
        rank = len(pair.down)
        divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
        scale = settings.get("lora_alpha", divisor) / divisor if pair.alpha is None else pair.alpha / rank
        up, down = (scale * pair.up).to(transformer.device), pair.down.to(transformer.device)
        if not (up @ down).to(transformer.dtype).isfinite().all():
            raise TeacherError(f"{path} is damaged: its change of {module} is not finite in {transformer.dtype}; "
                               "download or export it again")  # fmt: skip
        factors[module] = up, down
    return Adapter(digest, factors)


def _find_file(path: Path) -> Path:
    """The file of an adapter: the path itself, or in a folder diffusers' name or the only safetensors file."""
    if not path.is_dir():
        if path.suffix != _ENDING:
            raise TeacherError(f"{path} is neither a folder nor a {_ENDING} file; adapters are loaded from these only")
        return path
    found = [path / FILE] if (path / FILE).exists() else sorted(path.glob(f"*{_ENDING}"))
    if len(found) != 1:
        names = " and ".join(each.name for each in found[:2]) or f"no {_ENDING} file"
        raise TeacherError(f"{path} holds {names}; give the path of the adapter's file")
    return found[0]


def _config_beside(path: Path) -> bytes:
    """peft's settings beside a file, which are its own if the folder has no other adapter."""
    config = path.with_name(_CONFIG)
    alone = path.name == FILE or len(list(path.parent.glob(f"*{_ENDING}"))) == 1
    return config.read_bytes() if alone and config.exists() else b""


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
