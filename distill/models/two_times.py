"""The second time of a flow map in SD3's transformer.

The time embedding becomes e(t, s) = e(t) + s E(s), where E is a small network whose last layer is zero-initialized. At
the start the student equals the teacher for every s. At s = 0 it is always, bit for bit, the plain transformer with the
student's weights. So the exported transformer runs in stock diffusers; E is a file beside it, for several steps.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, TimestepEmbedding
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import TeacherError
from distill.models.weights import first_nonfinite

FILE = "second_time.safetensors"
_T = TypeVar("_T")
_PREFIX = "time_text_embed.second_time."
# Radians of the fastest feature over s in [0, 1]. Losses differentiate in s; the 1000 radians of t would add noise.
_FREQUENCY = 10.0


class TwoTimes(nn.Module):
    """SD3's embedding of time and pooled text, for timesteps (B,) or (B, 2), in [0, 1000]."""

    def __init__(self, one: CombinedTimestepTextProjEmbeddings) -> None:
        super().__init__()
        self.time_proj = one.time_proj
        self.timestep_embedder = one.timestep_embedder
        self.text_embedder = one.text_embedder
        last = one.timestep_embedder.linear_2
        self.second_time = TimestepEmbedding(one.time_proj.num_channels, last.out_features).to(last.weight.device)
        nn.init.zeros_(self.second_time.linear_2.weight)
        nn.init.zeros_(self.second_time.linear_2.bias)

    def forward(self, timestep: Tensor, pooled_projection: Tensor) -> Tensor:
        """The conditioning (B, D)."""
        t = timestep if timestep.ndim == 1 else timestep[:, 0]
        of_t = self.timestep_embedder(self.time_proj(t).to(pooled_projection.dtype))
        embedded: Tensor = of_t + self.text_embedder(pooled_projection)
        if timestep.ndim == 1:
            return embedded
        s = timestep[:, 1] / 1000
        addition: Tensor = s[:, None] * self.second_time(self.time_proj(_FREQUENCY * s))
        return embedded + addition.to(embedded.dtype)


def add_second_time(transformer: SD3Transformer2DModel) -> dict[str, nn.Parameter]:
    """Make a transformer take two times; returns the added fp32 parameters by name."""
    transformer.time_text_embed = TwoTimes(transformer.time_text_embed)
    added = transformer.time_text_embed.second_time
    return {_PREFIX + name: parameter for name, parameter in added.named_parameters()}


def split(weights: Mapping[str, _T]) -> tuple[dict[str, _T], dict[str, _T]]:
    """Split a student's weights into those of the plain transformer and those of the second time, if any."""
    second = {name: tensor for name, tensor in weights.items() if name.startswith(_PREFIX)}
    return {name: tensor for name, tensor in weights.items() if name not in second}, second


def save_second_time(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights of the second time beside an exported transformer."""
    save_file({name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}, folder / FILE)


def load_second_time(transformer: SD3Transformer2DModel, folder: Path) -> None:
    """Make an exported transformer take two times. Raises TeacherError when the file is missing or damaged."""
    parameters = add_second_time(transformer)
    try:
        tensors = load_file(folder / FILE)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name]).requires_grad_(False)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise TeacherError(f"{folder / FILE} is missing or damaged ({error}); export the student again") from error
    if (bad := first_nonfinite(parameters)) is not None:
        raise TeacherError(f"{folder / FILE} is damaged: {bad} is not finite; export the student again")
