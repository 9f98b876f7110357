"""Sampling, velocities and latents are the stock pipeline's; folders that are not whole are told apart."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import PROMPTS, make_teacher, stock_pipeline

from distill.errors import TeacherError
from distill.meter import Meter
from distill.teacher import (
    decode_in_parts,
    decode_latents,
    encode_images,
    euler_times,
    guided,
    load_transformer,
    load_vae,
    read_spec,
    sample,
    velocity,
)
from distill.text import SD3TextEncoder


def test_the_spec_has_the_folders_numbers(teacher: Path, teacher_t5: Path) -> None:
    spec = read_spec(teacher)
    assert (spec.latent_shape, spec.image_size, spec.text_shape) == ((4, 8, 8), 16, (8, 48))
    assert (spec.max_sequence_length, spec.has_t5, spec.shift) == (0, False, 3.0)
    assert (spec.scaling_factor, spec.shift_factor, spec.guidance) == (1.5, 0.06, 7.0)
    assert spec.parameters == sum(p.numel() for p in load_transformer(teacher).state_dict().values())
    assert read_spec(teacher_t5).text_shape == (14, 48)


def test_a_folder_without_a_record_takes_the_stock_length(tmp_path: Path) -> None:
    assert read_spec(make_teacher(tmp_path, max_sequence_length=None)).max_sequence_length == 256


def test_the_digest_follows_the_weights_and_not_the_place(teacher: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(teacher, tmp_path / "copy")
    assert read_spec(copy).digest == read_spec(teacher).digest
    assert read_spec(make_teacher(tmp_path / "other", seed=1)).digest != read_spec(teacher).digest


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (1, 3.0), (4, 1.0), (28, 3.0)])
def test_times_are_the_schedulers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert torch.allclose(euler_times(steps, shift), scheduler.sigmas, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (3, 1.0), (5, 4.0)])
@pytest.mark.parametrize("name", ["teacher", "teacher_t5"])
def test_sampling_is_the_stock_pipelines(name: str, steps: int, scale: float, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    spec = read_spec(folder)
    z = torch.randn(len(PROMPTS), *spec.latent_shape, generator=torch.Generator().manual_seed(1))

    encoder = SD3TextEncoder.load(folder)
    transformer = load_transformer(folder)
    u = guided(lambda x_t, t, cond: velocity(transformer, x_t, t, cond), encoder.encode([""]), scale)
    ours = sample(u, z, encoder.encode(PROMPTS), steps, spec.shift)

    stock = stock_pipeline(folder)
    theirs = stock(
        PROMPTS, latents=z, num_inference_steps=steps, guidance_scale=scale, output_type="latent",
        max_sequence_length=spec.max_sequence_length,
    ).images  # fmt: skip
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_velocity_is_fp32_from_any_weights(teacher: Path) -> None:
    encoder = SD3TextEncoder.load(teacher)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.25, 1.0])
    exact = velocity(load_transformer(teacher), x_t, t, encoder.encode(PROMPTS[:2]))
    coarse = velocity(load_transformer(teacher, torch.bfloat16), x_t, t, encoder.encode(PROMPTS[:2]))
    assert exact.dtype == coarse.dtype == torch.float32
    assert torch.allclose(exact, coarse, atol=0.05)


def test_latents_are_scaled_as_stock_does(teacher: Path) -> None:
    vae, stock = load_vae(teacher), stock_pipeline(teacher)
    latents = torch.randn(2, 4, 8, 8)
    stock_pixels = stock.vae.decode(latents / 1.5 + 0.06, return_dict=False)[0]
    assert torch.equal(decode_latents(vae, latents), stock_pixels)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = vae.encode(pixels).latent_dist.mean
    assert torch.allclose(encode_images(vae, pixels), (mean - 0.06) * 1.5)


def test_decoding_in_parts_gives_the_same_images_and_holds_less(teacher: Path) -> None:
    vae, latents = load_vae(teacher), torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Meter() as whole:
        expected = decode_latents(vae, latents)
    with torch.no_grad(), Meter() as parts:
        found = decode_in_parts(vae, latents, at_once=2 * 16 * 16)
    torch.testing.assert_close(found, expected)
    assert parts.peak < whole.peak / 2


def _truncate(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _cut_header(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "is missing": lambda folder: shutil.rmtree(folder / "vae"),
    "model_index.json is missing": lambda folder: (folder / "model_index.json").unlink(),
    "cannot be read as JSON": lambda folder: (folder / "vae" / "config.json").write_text("{"),
    "config.json is missing": lambda folder: (folder / "transformer" / "config.json").unlink(),
    "it is truncated": _truncate,
    "not a whole safetensors file": _cut_header,
    "only safetensors weights are loaded": lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(),
    "holds a FluxPipeline": lambda folder: _edit(folder / "model_index.json", _class_name="FluxPipeline"),
    "has UNet2DModel as transformer": lambda folder: _edit(
        folder / "model_index.json", transformer=["diffusers", "UNet2DModel"]
    ),
    "only a static shift": lambda folder: _edit(
        folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True
    ),
    "lacks 'patch_size'": lambda folder: (folder / "transformer" / "config.json").write_text(
        '{"in_channels": 4, "sample_size": 8}'
    ),
    "is not usable": lambda folder: _edit(folder / "vae" / "config.json", shift_factor=None),
}


@pytest.mark.parametrize("sentence", DAMAGE)
def test_a_folder_that_is_not_whole_is_refused(sentence: str, teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "damaged")
    DAMAGE[sentence](folder)
    with pytest.raises(TeacherError, match=sentence) as caught:
        read_spec(folder)
    assert str(folder) in str(caught.value)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="is not a folder"):
        read_spec(tmp_path / "nothing")
