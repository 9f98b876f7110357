"""LoRA files of other programs, read as pairs of matrices for the transformer's layers.

Layers are named as in diffusers or as in the original code, with dots or underscores and a prefix of the program:
diffusers (`transformer.`), peft (`base_model.model.`), ComfyUI (`diffusion_model.`), kohya (`lora_unet_`), OneTrainer
(`lora_transformer_`) and LyCORIS (`lycoris_`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from distill.models.original_layout import OriginalLayer, transformer_layout

_TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:(?:(?P<down>lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight"
    r"|(?P<alpha>alpha))"
)
_PREFIX = re.compile(r"(?:base_model\.model\.)?(?:(?:lora_)?transformer\.|(?:model\.)?diffusion_model\.)?")
_FLAT_PREFIX = re.compile(r"lora_unet_|lora_transformer_|lycoris_")
_OTHERS = {  # what is not supported, by patterns in the names of its tensors
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_",
    "OFT": r"\.b?oft_",
    "a LoCon": r"\.lora_mid",
    "full weights": r"\.(diff|diff_b|w_norm|b_norm)$",
    "a text embedding": r"^bundle_emb",
    "a text encoder": r"^(lora_)?(text_encoders?|te|clip|t5(xxl)?)[\d_.]",
}


@dataclass(eq=False)
class LoraPair:
    """Weights of an adapter for a linear layer: up (out, r), down (r, in), and alpha if the file states one."""

    up: Tensor
    down: Tensor
    alpha: float | None


def read_pairs(tensors: Mapping[str, Tensor], transformer: SD3Transformer2DModel) -> dict[str, LoraPair]:
    """Sort the tensors of a LoRA file into pairs by the transformer's module.

    A layer of the original that is three in diffusers gives three pairs with the same down matrix and alpha. Raises
    ValueError naming the first tensor that is no part of a pair, and the first pair without a linear layer of its
    shape.
    """
    given: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        other = next((kind for kind, pattern in _OTHERS.items() if re.search(pattern, name)), None)
        if other is not None or found is None:
            kind = "" if other is None else f" of {other}"
            raise ValueError(f"holds {name}{kind}; only LoRA pairs of the transformer's linear layers are supported")
        part = "alpha" if found["alpha"] else "down" if found["down"] else "up"
        if part in given.setdefault(found["layer"], {}):
            raise ValueError(f"holds {name} and another tensor of the same meaning")
        given[found["layer"]][part] = tensor
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    sources = _sources(linears)
    flat = {name.replace(".", "_"): source for name, source in sources.items()}
    pairs: dict[str, LoraPair] = {}
    for layer, parts in given.items():
        prefix = _FLAT_PREFIX.match(layer)
        plain = layer[prefix.end() :] if prefix else _PREFIX.sub("", layer, count=1)
        source = (flat if prefix else sources).get(plain)
        if source is None:
            raise ValueError(f"is for another transformer: there is no linear layer {plain} in this one")
        if missing := {"up", "down"} - parts.keys():
            raise ValueError(f"lacks the {missing.pop()} matrix of {layer}")
        up, down, alpha = parts["up"], parts["down"], parts.get("alpha")
        sizes = [linears[module].out_features for module in source.modules]
        width, rank = linears[source.modules[0]].in_features, up.shape[-1] if up.dim() else 0
        if rank == 0 or down.shape != (rank, width) or up.shape != (sum(sizes), rank):
            raise ValueError(f"is for another transformer: {plain} is not a linear layer of its shape")
        if alpha is not None and alpha.numel() != 1:
            raise ValueError(f"holds {layer}.alpha, which is not one number")
        if source.swapped:
            up = torch.cat(up.chunk(2)[::-1])
        for module, rows in zip(source.modules, torch.split(up, sizes), strict=True):
            if module in pairs:
                raise ValueError(f"holds {module} twice, under two names")
            pairs[module] = LoraPair(rows, down, None if alpha is None else float(alpha))
    return pairs


def _sources(modules: Mapping[str, nn.Module]) -> dict[str, OriginalLayer]:
    """The modules behind each name of a layer: diffusers', the original's, and OneTrainer's of a part of the latter."""
    original = transformer_layout(modules)
    parts = {
        f"{name}.{index}": OriginalLayer((module,))
        for name, source in original.items()
        for index, module in enumerate(source.modules)
        if len(source.modules) > 1
    }
    return {**{module: OriginalLayer((module,)) for module in modules}, **original, **parts}
