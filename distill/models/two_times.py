"""The second time of a flow map in SD3's transformer.

The time embedding becomes e(t, s) = e(t) + s E(s), E a small network whose last layer starts at zero. So at the start
the student is the teacher for every s, and at s = 0 it is, always and to the bit, the plain transformer with the
student's own weights: what is exported runs in stock diffusers, and E lies beside it for those who take more steps.
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
from distill.models.finite import not_finite

FILE = "second_time.safetensors"
_T = TypeVar("_T")
_PREFIX = "time_text_embed.second_time."
# Radians of the fastest feature over s in [0, 1]; losses differentiate in s, and the 1000 of t would be noise there.
_FREQUENCY = 10.0


class TwoTimes(nn.Module):
    """SD3's embedding of time and pooled text, taking times (B,) as before or (B, 2); both count to 1000."""

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
    """Let a transformer take two times; the parameters added, fp32 and by their names in it."""
    transformer.time_text_embed = TwoTimes(transformer.time_text_embed)
    added = transformer.time_text_embed.second_time
    return {_PREFIX + name: parameter for name, parameter in added.named_parameters()}


def split(weights: Mapping[str, _T]) -> tuple[dict[str, _T], dict[str, _T]]:
    """A student's weights without those of the second time, and those by themselves; none for one time."""
    second = {name: tensor for name, tensor in weights.items() if name.startswith(_PREFIX)}
    return {name: tensor for name, tensor in weights.items() if name not in second}, second


def save_second_time(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write what `split` found beside an exported transformer."""
    save_file({name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}, folder / FILE)


def load_second_time(transformer: SD3Transformer2DModel, folder: Path) -> None:
    """Let an exported transformer take two times. Raises TeacherError when the file is missing or damaged."""
    parameters = add_second_time(transformer)
    try:
        tensors = load_file(folder / FILE)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name]).requires_grad_(False)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise TeacherError(f"{folder / FILE} is missing or damaged ({error}); export the student again") from error
    if (bad := not_finite(parameters)) is not None:
        raise TeacherError(f"{folder / FILE} is damaged: {bad} is not finite; export the student again")
