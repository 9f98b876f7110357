"""LoRA adapters on a transformer at work: merged into its weights in place, and taken out again to the bit.

W' = W + scale B A is computed from the untouched W whenever the adapter or its scale changes. The network's graph stays
the same, so nothing is compiled again, whatever the rank, and an image pays nothing for an adapter. A change costs one
pass over the weights that the adapter touches; untouched copies of those stay beside the transformer.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.errors import TeacherError
from distill.finite import not_finite

FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it, and `distill export` beside a merged student
_PREFIX = "transformer."
_METADATA = "lora_adapter_metadata"  # where diffusers keeps alpha


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a file adds to a transformer. `factors` are B (out, r), alpha / r taken in, and A (r, in), by module."""

    digest: str
    factors: Mapping[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path | str, transformer: SD3Transformer2DModel) -> Adapter:
    """The adapter of a folder, fp32 on the transformer's device. Changes nothing of the transformer.

    Raises TeacherError for a file that is missing or damaged, or that holds anything but pairs for its linear layers.
    """
    path = Path(folder) / FILE
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise TeacherError(f"{path} is missing or damaged: {error}; fetch or export it again") from error
    if told.get(f"{_PREFIX}alpha_pattern") or told.get(f"{_PREFIX}use_dora"):
        raise TeacherError(f"{path} has an alpha for each layer or is a DoRA; only plain LoRA adapters are taken")
    if (bad := not_finite(tensors)) is not None:
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
        scale = float(told.get(f"{_PREFIX}lora_alpha", len(a)) if alpha is None else alpha) / len(a)
        factors[module] = (scale * b).to(linear.weight.device), a.to(linear.weight.device)
    if tensors or not factors:
        raise TeacherError(f"{path} holds {next(iter(tensors), 'nothing')}; only pairs for a transformer are taken")
    return Adapter(digest, factors)


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
