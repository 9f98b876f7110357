"""Presets of real models: their own runs end with a student, and their steps fit those models' true geometry."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from tiny import distilled

from distill.config import load_config
from distill.methods.base import ROLES
from distill.models.geometry import NAMES, read_geometry
from distill.models.text import TextCondition
from distill.pipeline import OneStepPipeline
from distill.plan.devices import GIB
from distill.plan.estimate import PlanInput, build
from distill.run import accelerator
from distill.training.trainer import train

PRESETS = [*(f"{name}-lora" for name in NAMES), "sd3-medium-full"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_distils_a_teacher_of_any_size(preset, teacher, tmp_path):
    config = load_config(preset)
    small = ["batch=4", f"micro_batch={2 if config.micro_batch else 'null'}", "images=8", "precision=fp32"]
    small += ["sizes=[[16,16],[24,16]]"] if config.sizes else []
    small += ["networks.rank=4", "networks.alpha=4"] if config.networks.kind == "lora" else []
    small += ["method.guidance.skip_layers=[0]"] if config.method.guidance.skip_layers else []
    small += ["optimizer.kind=adam"]  # in 8 bits it is for CUDA
    out = distilled(teacher, tmp_path, *small, preset=preset)
    assert OneStepPipeline.load(out / "student")(["a red circle"], [0]).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_role_of_a_preset_learns_at_its_model_s_widths(preset):
    """Forward and backward on tensors without data, with one block of each kind."""
    config, geometry = load_config(preset), read_geometry(preset.rpartition("-")[0])
    dual = {"dual_attention_layers": (0,)} if "dual_attention_layers" in geometry.transformer else {}
    geometry = replace(geometry, transformer={**geometry.transformer, "num_layers": 2, **dual})
    shape, images = geometry.transformer, config.micro_batch or config.batch
    networks = build(geometry, config.networks, torch.float32)
    for width, height in config.sizes or [(geometry.image_size,) * 2]:
        geometry.check_size(max(width, height))
        latents = (shape["in_channels"], height // geometry.pixels_per_latent, width // geometry.pixels_per_latent)
        with torch.device("meta"):
            z, t = torch.empty(images, *latents), torch.empty(images)
            embeds = torch.empty(images, geometry.tokens, shape["joint_attention_dim"])
            cond = TextCondition(embeds, torch.empty(images, shape["pooled_projection_dim"]))
        for role in ROLES:
            with networks.using(role):
                out = networks.velocity(role)(z, t, cond)
                assert out.shape == z.shape
                out.mean().backward()
            assert all(tensor.grad.shape == tensor.shape for tensor in networks.trainable(role).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_of_the_whole_model_takes_the_memory_that_is_planned(preset, tmp_path):
    """Random weights of the true geometry, one image per step; the second step is measured."""
    geometry = read_geometry(preset.rpartition("-")[0])
    config = load_config(preset, ["batch=1", "micro_batch=1", "sizes=[]", "trackers=[]", "networks.compile=false"])
    kind, size = config.optimizer.kind, geometry.image_size
    plan = PlanInput(geometry, config.networks, torch.bfloat16, 1, size, config.method, kind).plan()
    steps = [size for moment, size in plan.stages.items() if moment.endswith("update") or moment == "optimizer step"]
    expected = max(steps) - plan.resident["autoencoder for grids"]
    free, _ = torch.cuda.mem_get_info()
    if expected + 4 * GIB > free:
        pytest.skip(f"needs {expected / GIB:.0f} GiB and 4 set aside; {free / GIB:.0f} are free")
    if config.optimizer.kind == "adam-8bit":
        pytest.importorskip("bitsandbytes")

    shape = geometry.transformer
    null = TextCondition(
        torch.zeros(1, geometry.tokens, shape["joint_attention_dim"]), torch.zeros(1, shape["pooled_projection_dim"])
    )

    class Prompts:
        def __init__(self):
            self.null = null

        def __len__(self):
            return 1

        def rows(self, indices):
            return null

        def shuffle(self, generator):
            return torch.zeros(1, dtype=torch.long)

    side = size // geometry.pixels_per_latent
    networks = build(geometry, config.networks, torch.bfloat16, device="cuda")
    before = {name: tensor.detach().cpu() for name, tensor in networks.trainable("student").items()}
    rounds = train(
        config, tmp_path, networks, Prompts(), [(shape["in_channels"], side, side)], accelerator(config, tmp_path)
    )
    with closing(rounds):
        next(rounds)
        torch.cuda.reset_peak_memory_stats()
        next(rounds)
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.1)
    after = {name: tensor.detach().cpu() for name, tensor in networks.trainable("student").items()}
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
