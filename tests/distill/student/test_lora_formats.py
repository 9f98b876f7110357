"""One LoRA in the layouts of several programs: the same weights as diffusers' own conversion of the adapted model."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from tiny import make_transformer

from distill.models.original_layout import transformer_layout, transformer_tensors
from distill.student.lora_formats import read_pairs

RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="module")
def transformer():
    """One block with a second attention, and the last block, whose context is not continued."""
    torch.manual_seed(0)
    return make_transformer(dual_attention_layers=(0,)).requires_grad_(False)


@pytest.fixture(scope="module")
def pairs(transformer):
    """A random pair (up, down) for each linear layer of the original."""
    torch.manual_seed(1)
    state = transformer.state_dict()
    made = {}
    for tensor in transformer_tensors(state):
        weight = tensor.build(state.__getitem__)
        if tensor.name.endswith(".weight") and weight.dim() == 2:
            up, down = torch.randn(len(weight), RANK), torch.randn(RANK, weight.shape[1])
            made[tensor.name.removesuffix(".weight")] = up, down
    return made


@pytest.fixture(scope="module")
def expected(transformer, pairs):
    """The change of each weight: the original's weights are changed, and diffusers converts them."""
    state = transformer.state_dict()
    original = {tensor.name: tensor.build(state.__getitem__).clone() for tensor in transformer_tensors(state)}
    for name, (up, down) in pairs.items():
        original[f"{name}.weight"] += ALPHA / RANK * up @ down
    changed = convert_sd3_transformer_checkpoint_to_diffusers(original)
    return {name: changed[name] - state[name] for name in state if not changed[name].equal(state[name])}


def diffusers_names(pairs, transformer):
    """The pairs of each layer of diffusers: rows of the original's."""
    linears = dict(transformer.named_modules())
    found = {}
    for name, source in transformer_layout(linears).items():
        if name in pairs:
            up, down = pairs[name]
            up = torch.cat(up.chunk(2)[::-1]) if source.swapped else up
            sizes = [linears[module].out_features for module in source.modules]
            found |= {module: (rows, down) for module, rows in zip(source.modules, torch.split(up, sizes), strict=True)}
    return found


def numbered_names(pairs):
    """OneTrainer's: the parts of query, key and value are numbered."""
    found = {}
    for name, (up, down) in pairs.items():
        parts = up.chunk(3) if name.endswith(".qkv") else [up]
        found |= {f"{name}.{i}" if len(parts) > 1 else name: (rows, down) for i, rows in enumerate(parts)}
    return found


LAYOUTS = {  # program: layers, prefix, whether flat, suffixes of down and up
    "diffusers": ("diffusers", "transformer.", False, "lora_A", "lora_B"),
    "diffusers of 2024": ("diffusers", "transformer.", False, "lora.down", "lora.up"),
    "peft": ("diffusers", "base_model.model.", False, "lora_A", "lora_B"),
    "peft, adapter's name": ("diffusers", "base_model.model.", False, "lora_A.style_1", "lora_B.style_1"),
    "kohya": ("original", "lora_unet_", True, "lora_down", "lora_up"),
    "ComfyUI": ("original", "diffusion_model.", False, "lora_A", "lora_B"),
    "OneTrainer": ("diffusers", "lora_transformer_", True, "lora_down", "lora_up"),
    "OneTrainer, dots": ("diffusers", "lora_transformer.", False, "lora_down", "lora_up"),
    "OneTrainer, OMI": ("numbered", "transformer.", False, "lora_down", "lora_up"),
    "LyCORIS": ("diffusers", "lycoris_", True, "lora_down", "lora_up"),
}


@pytest.mark.parametrize("program", LAYOUTS)
def test_every_program_writes_the_same_change(program, transformer, pairs, expected):
    names, prefix, flat, down_suffix, up_suffix = LAYOUTS[program]
    layers = {
        "original": pairs,
        "diffusers": diffusers_names(pairs, transformer),
        "numbered": numbered_names(pairs),
    }[names]
    tensors = {}
    for layer, (up, down) in layers.items():
        name = prefix + (layer.replace(".", "_") if flat else layer)
        tensors |= {f"{name}.{down_suffix}.weight": down, f"{name}.{up_suffix}.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    found = read_pairs(tensors, transformer)
    assert {f"{module}.weight" for module in found} == expected.keys()
    for module, pair in found.items():
        change = pair.alpha / len(pair.down) * pair.up @ pair.down
        torch.testing.assert_close(change, expected[f"{module}.weight"], atol=1e-4, rtol=1e-4)


PAIR = {
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.zeros(2, 32),
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.zeros(96, 2),
}


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (2, 4), "of a text encoder; only LoRA pairs"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", (2, 4), "of a text encoder"),
        ("t5.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight", (2, 4), "of a text encoder"),
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_w1", (2, 2), "lokr_w1 of LoKr"),
        ("lora_unet_joint_blocks_0_x_block_mlp_fc1.hada_w1_a", (2, 2), "of LoHa"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.dora_scale", (1, 32), "of DoRA"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector", (32,), "of DoRA"),
        ("lora_unet_x_embedder_proj.lora_mid.weight", (2, 2, 2, 2), "of a LoCon"),
        ("lora_unet_joint_blocks_0_x_block_mlp_fc1.diff", (128, 32), "of full weights"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_B.bias", (32,), "holds transformer.*bias; only LoRA pairs"),
        ("lora_unet_x_embedder_proj.lora_down.weight", (2, 4, 2, 2), "no linear layer x_embedder_proj"),
        ("lora_unet_joint_blocks_9_x_block_attn_qkv.lora_up.weight", (96, 2), "no linear layer joint_blocks_9"),
        ("lora_unet_joint_blocks_1_x_block_attn_qkv.lora_up.weight", (96, 2), "lacks the down matrix of lora_unet_jo"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.alpha", (2,), "alpha, which is not one number"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_A.weight", (2, 32), "another tensor of the same meaning"),
    ],
)
def test_what_is_no_lora_pair_is_refused_by_name(transformer, name, shape, match):
    with pytest.raises(ValueError, match=match):
        read_pairs(PAIR | {name: torch.zeros(shape)}, transformer)


def test_a_layer_under_two_names_and_another_shape_are_refused(transformer):
    twice = {f"transformer.transformer_blocks.0.attn.to_k.lora_{part}.weight": torch.zeros(32, 32) for part in "AB"}
    with pytest.raises(ValueError, match=r"holds transformer_blocks\.0\.attn\.to_k twice"):
        read_pairs(PAIR | twice, transformer)
    other = {name: torch.zeros(96, 3) if "up" in name else tensor for name, tensor in PAIR.items()}
    with pytest.raises(ValueError, match="attn_qkv is not a linear layer of its shape"):
        read_pairs(other, transformer)
