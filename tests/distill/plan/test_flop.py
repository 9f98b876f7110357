"""Formulas of arithmetic agree with operations that are counted."""

from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from distill.config import load_config
from distill.models.geometry import read_geometry
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.plan import flop

SMALL = {"num_layers": 2, "num_attention_heads": 8, "caption_projection_dim": 512, "sample_size": 32}


def test_a_prompt_costs_what_its_encoders_do(teacher_t5):
    encoder = SD3TextEncoder.load(SD3Folder.read(teacher_t5))
    with FlopCounterMode(display=False) as counted:
        encoder.encode(["a red circle"])
    found = flop.encoding_flop(read_geometry(str(teacher_t5)))
    assert found == pytest.approx(counted.get_total_flops(), rel=0.05)
    assert flop.encoding_flop(read_geometry("sd3-medium")) == pytest.approx(2.51e12, rel=0.01)


def test_an_image_costs_what_the_networks_do():
    geometry = read_geometry("sd3.5-medium")
    geometry = replace(geometry, transformer={**geometry.transformer, **SMALL, "dual_attention_layers": (0,)})
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        SD3Transformer2DModel.from_config(geometry.transformer)(
            torch.empty(1, 16, 32, 32), torch.empty(1, 333, 4096), torch.empty(1, 2048), torch.empty(1)
        )
    matrices, attention = flop._network_flop(geometry, 256, 256)
    assert matrices + attention == pytest.approx(counted.get_total_flops(), rel=0.2)  # its ends are a part of it


@pytest.mark.parametrize(("preset", "counted"), [("sd3-medium-lora", 233.3e12), ("sd3-medium-full", 244.2e12)])
def test_a_round_costs_what_its_plan_counts(preset, counted):
    """The expected values are those of `distill plan`, which takes too long for a test."""
    config = load_config(preset)
    found = flop.training_flop(
        read_geometry("sd3-medium"), config.networks, config.method.update_phases(), [(1024, 1024)], 4
    )
    assert found == pytest.approx(counted, rel=0.03)
