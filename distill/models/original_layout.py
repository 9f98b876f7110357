"""The names and tensors of Stable Diffusion 3's original code, which single-file checkpoints and many adapters use.

A module of the original is one or several modules of diffusers, whose weights are concatenated along the first
dimension: query, key and value are one layer there. The last layers' modulations return (shift, scale) there, and
(scale, shift) in diffusers.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_VAE = (  # replacements in diffusers' names, in this order
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", r"decoder.up.\1.block.\2"),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0", r"decoder.up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


@dataclass(frozen=True)
class OriginalLayer:
    """The modules of diffusers that a module of the original consists of. `swapped`: its halves are exchanged."""

    modules: tuple[str, ...]
    swapped: bool = False


def transformer_layout(modules: Collection[str]) -> dict[str, OriginalLayer]:
    """Map the original's names to modules of an `SD3Transformer2DModel`, whose names `modules` contains."""
    layout = {
        name: OriginalLayer((module,), swapped=module == "norm_out.linear")
        for name, module in _LAYERS.items()
        if module in modules
    }
    blocks = {int(name.split(".")[1]) for name in modules if name.startswith("transformer_blocks.")}
    for block in sorted(blocks):
        for name, parts in _BLOCK.items():
            sources = tuple(f"transformer_blocks.{block}.{part}" for part in parts)
            if sources[0] in modules:
                swapped = block == max(blocks) and parts == ("norm1_context.linear",)
                layout[f"joint_blocks.{block}.{name}"] = OriginalLayer(sources, swapped)
    return layout


@dataclass(frozen=True)
class OriginalTensor:
    """A tensor of the original, and the tensors of diffusers that it is made of."""

    name: str
    sources: tuple[str, ...]
    swapped: bool = False  # its halves are exchanged
    convolution: bool = False  # with a kernel of 1x1, where diffusers has a linear layer

    def build(self, read: Callable[[str], Tensor]) -> Tensor:
        """Compute the tensor from those of diffusers, which `read` returns by name."""
        tensor = torch.cat([read(source) for source in self.sources])
        if self.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor[..., None, None] if self.convolution else tensor


def transformer_tensors(names: Collection[str]) -> list[OriginalTensor]:
    """The original's tensors of an `SD3Transformer2DModel` with the tensors `names`."""
    found = [OriginalTensor("pos_embed", ("pos_embed.pos_embed",))]
    for name, source in transformer_layout({name.rpartition(".")[0] for name in names}).items():
        for kind in ("weight", "bias"):
            tensors = tuple(f"{module}.{kind}" for module in source.modules)
            if tensors[0] in names:
                found.append(OriginalTensor(f"{name}.{kind}", tensors, source.swapped))
    return found


def vae_tensors(names: Collection[str]) -> list[OriginalTensor]:
    """The original's tensors of an `AutoencoderKL` with the tensors `names`."""
    last = max(int(name.split(".")[2]) for name in names if name.startswith("decoder.up_blocks."))
    found = []
    for name in names:
        original = name
        for pattern, replacement in _VAE:
            original = re.sub(pattern, replacement, original)
        # The original counts the decoder's blocks from its output.
        original = re.sub(r"(?<=^decoder\.up\.)\d+", lambda match: str(last - int(match[0])), original)
        projection = ".mid.attn_1." in original and ".norm." not in original and name.endswith(".weight")
        found.append(OriginalTensor(original, (name,), convolution=projection))
    return found
