"""The original layout gives the same tensors after diffusers' own conversion, for each kind of SD3."""

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from tiny import SD3_KINDS, make_transformer

from distill.models.original_layout import transformer_tensors, vae_tensors


def original(tensors, state):
    return {tensor.name: tensor.build(state.__getitem__) for tensor in tensors}


def assert_equal(made, state):
    assert made.keys() == state.keys()
    assert all(made[name].equal(tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kind", SD3_KINDS)
def test_a_transformer_survives_the_way_through_the_original_layout(kind, tmp_path):
    torch.manual_seed(0)
    transformer = make_transformer(**SD3_KINDS[kind])
    transformer.save_config(tmp_path)
    state = transformer.state_dict()
    made = original(transformer_tensors(state), state)
    assert made["joint_blocks.0.x_block.attn.qkv.weight"].shape == (96, 32)
    assert not any(name.startswith("joint_blocks.1.context_block.mlp") for name in made) or kind == "sd3.5-large"
    read = SD3Transformer2DModel.from_single_file(made, config=str(tmp_path), local_files_only=True)
    assert_equal(read.state_dict(), state)


def test_an_autoencoder_survives_the_way_through_the_original_layout(teacher):
    state = AutoencoderKL.from_pretrained(teacher / "vae", local_files_only=True).state_dict()
    made = original(vae_tensors(state), state)
    assert made["decoder.up.1.block.0.conv1.weight"].equal(state["decoder.up_blocks.0.resnets.0.conv1.weight"])
    assert made["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    read = AutoencoderKL.from_single_file(made, config=str(teacher / "vae"), local_files_only=True)
    assert_equal(read.state_dict(), state)
