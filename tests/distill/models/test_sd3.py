"""Velocity, guidance, sampling and latents against the stock pipeline."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import PROMPTS, stock_pipeline

from distill.methods.policies import TeacherGuidance, guided_at
from distill.models.sd3 import (
    decode_in_parts,
    decode_latents,
    encode_images,
    euler_times,
    load_transformer,
    load_vae,
    sample,
    velocity,
)
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.plan.meter import Meter


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (1, 3.0), (4, 1.0), (28, 3.0)])
def test_times_are_the_schedulers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert torch.allclose(euler_times(steps, shift), scheduler.sigmas, rtol=0, atol=1e-7)


GUIDANCE = [(1, {"scale": 1}), (3, {"scale": 1}), (5, {"scale": 4}), (12, {"scale": 4, "skip_layers": [0]})]


@pytest.mark.parametrize(("steps", "guidance"), GUIDANCE)
@pytest.mark.parametrize("name", ["teacher", "teacher_t5"])
def test_sampling_is_the_stock_pipelines(name: str, steps: int, guidance, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    spec = SD3Folder.read(folder)
    z = torch.randn(len(PROMPTS), *spec.latent_shape, generator=torch.Generator().manual_seed(1))

    encoder = SD3TextEncoder.load(SD3Folder.read(folder))
    transformer = load_transformer(SD3Folder.read(folder))
    target = TeacherGuidance(**guidance)
    u = guided_at(target, partial(velocity, transformer), encoder.encode([""]), target.scale)
    ours = sample(u, z, encoder.encode(PROMPTS), steps, spec.shift)

    stock = stock_pipeline(folder)
    theirs = stock(
        PROMPTS, latents=z, num_inference_steps=steps, guidance_scale=target.scale, output_type="latent",
        max_sequence_length=spec.max_sequence_length, skip_guidance_layers=guidance.get("skip_layers"),
    ).images  # fmt: skip
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_velocity_is_fp32_from_any_weights(teacher: Path) -> None:
    encoder = SD3TextEncoder.load(SD3Folder.read(teacher))
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.25, 1.0])
    exact = velocity(load_transformer(SD3Folder.read(teacher)), x_t, t, encoder.encode(PROMPTS[:2]))
    coarse = velocity(load_transformer(SD3Folder.read(teacher), torch.bfloat16), x_t, t, encoder.encode(PROMPTS[:2]))
    assert exact.dtype == coarse.dtype == torch.float32
    assert torch.allclose(exact, coarse, atol=0.05)


def test_latents_are_scaled_as_stock_does(teacher: Path) -> None:
    vae, stock = load_vae(SD3Folder.read(teacher)), stock_pipeline(teacher)
    latents = torch.randn(2, 4, 8, 8)
    stock_pixels = stock.vae.decode(latents / 1.5 + 0.06, return_dict=False)[0]
    assert torch.equal(decode_latents(vae, latents), stock_pixels)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = vae.encode(pixels).latent_dist.mean
    assert torch.allclose(encode_images(vae, pixels), (mean - 0.06) * 1.5)


def test_decoding_in_parts_gives_the_same_images_and_holds_less(teacher: Path) -> None:
    vae, latents = (
        load_vae(SD3Folder.read(teacher)),
        torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad(), Meter() as whole:
        expected = decode_latents(vae, latents)
    with torch.no_grad(), Meter() as parts:
        found = decode_in_parts(vae, latents, at_once=2 * 16 * 16)
    torch.testing.assert_close(found, expected)
    assert parts.peak < whole.peak / 2
