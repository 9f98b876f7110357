"""FLOP of Stable Diffusion 3's networks by closed formulas: matrix products and attention, a multiply-add is two.

A plan counts a training step exactly, which takes minutes for a large model; these agree with it within a few
percent and take no time, so a run can state its cost at its start.
"""

from collections.abc import Iterable
from typing import Any

from distill.config import Full, Lora
from distill.methods.base import UpdatePhase
from distill.models.geometry import Geometry
from distill.plan.step_cost import network_calls, skip_share

_ATTENTION_BACKWARD = 2.5  # of the forward's products; fused kernels compute the scores again


def encoding_flop(geometry: Geometry) -> float:
    """FLOP of encoding one prompt with all text encoders."""
    return sum(_encoder_flop(geometry, name, config) for name, config in geometry.text.items())


def training_flop(
    geometry: Geometry,
    networks: Full | Lora,
    phases: Iterable[UpdatePhase],
    sizes: Iterable[tuple[int, int]],
    batch: int,
) -> float:
    """FLOP per image of one round of updates, averaged over image sizes (width, height) in pixels.

    `batch` images are in a micro-batch, which makes skip-layer calls if one of its images needs them.
    """
    costs = [_network_flop(geometry, *size) for size in sizes]
    matrices, attention = (sum(parts) / len(costs) for parts in zip(*costs, strict=True))
    total = 0.0
    for phase in phases:
        share = skip_share(phase, batch)
        for call in network_calls(phase):
            passes = (2 if call.forward_mode else 1) * (matrices + attention)
            if call.backward:
                learns = call.role == phase.role and isinstance(networks, Full)
                passes += (2 if learns else 1) * matrices + _ATTENTION_BACKWARD * attention
                passes += (matrices + attention) * networks.gradient_checkpointing
            kept = 1 - len(call.skip_layers) / geometry.transformer["num_layers"]
            total += phase.steps * call.rows * passes * kept * (share if call.skip_layers else 1)
    return total


def velocity_flop(geometry: Geometry, size: tuple[int, int]) -> float:
    """FLOP of one network evaluation of an image of a (width, height) in pixels, without gradient."""
    return sum(_network_flop(geometry, *size))


def _network_flop(geometry: Geometry, width: int, height: int) -> tuple[float, float]:
    """FLOP of one image through the transformer: of its matrices, and of the products within attention."""
    config = geometry.transformer
    patch = geometry.pixels_per_latent * int(config["patch_size"])
    image = width * height / patch**2
    tokens, layers, dual = image + geometry.tokens, config["num_layers"], len(config.get("dual_attention_layers") or ())
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    matrices = (layers * 12 * tokens + dual * 4 * image) * 2 * channels**2
    attention = (layers * tokens**2 + dual * image**2) * 4 * channels
    return matrices, attention


def _encoder_flop(geometry: Geometry, name: str, config: dict[str, Any]) -> float:
    if name == "text_encoder_3":
        tokens, width, layers = geometry.t5_tokens, config["d_model"], config["num_layers"]
        inner = config["num_heads"] * config["d_kv"]
        products = 4 * width * inner + 3 * width * config["d_ff"]
    else:
        tokens, layers = geometry.clip_tokens, config.get("num_hidden_layers", 12)
        width = inner = config.get("hidden_size", 512)
        products = 4 * width**2 + 2 * width * config.get("intermediate_size", 2048)
    return float(layers * (2 * products * tokens + 4 * tokens**2 * inner))
