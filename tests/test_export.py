"""The student folder: stock diffusers and our pipeline make the same of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import PROMPTS, stock_pipeline

from distill.errors import CheckpointError, SizeError, TeacherError
from distill.export import export_student
from distill.flow import noise, one_step
from distill.networks import ROLES, Lora, SharedBase, build
from distill.pipeline import OneStepPipeline
from distill.teacher import load_transformer
from distill.text import SD3TextEncoder

CPU = torch.device("cpu")
RECIPE = {"name": "tiny-one-step", "method": "fgm", "images_seen": 12}


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every weight of the teacher moved a little."""
    torch.manual_seed(1)
    weights = {name: p + 0.02 * torch.randn_like(p) for name, p in load_transformer(teacher).named_parameters()}
    return export_student(teacher, weights, tmp_path_factory.mktemp("students") / "full", RECIPE, dtype=torch.float32)


def stock_latents(pipeline, prompts, z, length):
    return pipeline(
        list(prompts),
        num_inference_steps=1,
        guidance_scale=0,
        latents=z,
        height=16,
        width=16,
        max_sequence_length=length,
        output_type="latent",
    ).images


def test_stock_diffusers_makes_the_same_latents_in_one_step(student):
    ours = OneStepPipeline.load(student)
    seeds = list(range(len(PROMPTS)))
    found = ours.latents(ours.encode(PROMPTS), seeds)
    expected = stock_latents(stock_pipeline(student), PROMPTS, noise(seeds, (4, 8, 8)), ours.spec.max_sequence_length)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_is_merged_and_also_loads_into_the_teacher(teacher, tmp_path):
    torch.manual_seed(2)
    networks = build(teacher, Lora(rank=4, alpha=8), torch.float32, CPU)
    assert isinstance(networks, SharedBase)
    for role in ROLES:
        for tensor in networks.trainable(role).values():
            tensor.data += 0.05 * torch.randn(tensor.shape)
    adapter = networks.adapter_state(networks.trainable("student"))
    out = export_student(teacher, adapter, tmp_path / "lora", RECIPE, networks.config, torch.float32)
    ours = OneStepPipeline.load(out)
    z, cond = noise(range(4), (4, 8, 8)), ours.encode(PROMPTS)
    trained = one_step(networks.velocity("student"), z, cond).detach()
    base = one_step(networks.velocity("teacher"), z, cond).detach()
    assert (trained - base).abs().max() > 0.01
    torch.testing.assert_close(ours.latents(cond, range(4)), trained, atol=1e-4, rtol=1e-4)

    stock = stock_pipeline(teacher)
    stock.load_lora_weights(out, local_files_only=True)
    torch.testing.assert_close(stock_latents(stock, PROMPTS, z, 0), trained, atol=1e-4, rtol=1e-4)


def test_a_seed_is_one_image_alone_and_in_any_batch(student):
    pipeline = OneStepPipeline.load(student)
    prompts, seeds = [PROMPTS[i % 4] for i in range(12)], list(range(100, 112))
    alone = torch.cat([pipeline([p], [s]) for p, s in zip(prompts, seeds, strict=True)])
    for size in range(2, 10):
        parts = [pipeline(prompts[i : i + size], seeds[i : i + size]) for i in range(0, 12, size)]
        assert torch.equal(torch.cat(parts), alone)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = pipeline([prompts[i] for i in order], [seeds[i] for i in order])
    assert torch.equal(shuffled, alone[order])


def test_the_record_says_what_serving_must_know(student, teacher):
    record = json.loads((student / "onestep.json").read_text())
    assert record["start_time"] == 1.0
    assert record["latent_shape"] == [4, 8, 8]
    assert record["max_sequence_length"] == 0
    spec = OneStepPipeline.load(student).spec
    assert (spec.name, spec.method, spec.images_seen, spec.sizes) == ("tiny-one-step", "fgm", 12, ((16, 16),))


def test_what_is_no_student_or_no_size_is_refused(teacher, student, tmp_path):
    with pytest.raises(TeacherError, match="teacher"):
        OneStepPipeline.load(teacher)
    with pytest.raises(TeacherError, match="not a folder"):
        OneStepPipeline.load(tmp_path / "nothing")
    pipeline = OneStepPipeline.load(student)
    with pytest.raises(SizeError, match="16x16"):
        pipeline(["a"], [0], 32, 32)


def test_export_replaces_a_student_only_by_a_whole_one(teacher, tmp_path):
    weights = dict(load_transformer(teacher).named_parameters())
    out = export_student(teacher, weights, tmp_path / "student", RECIPE)
    export_student(teacher, weights, out, {**RECIPE, "images_seen": 13})
    assert OneStepPipeline.load(out).spec.images_seen == 13
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert SD3TextEncoder.load(out).encode([""]).embeds.shape == (1, 8, 48)


def test_only_what_stock_loads_is_copied_and_no_path_of_this_machine_with_it(teacher, tmp_path):
    crowded = shutil.copytree(teacher, tmp_path / "crowded")
    (crowded / "whole_model.safetensors").write_bytes(b"twice the size")
    (crowded / "text_encoder" / "model.fp16.safetensors").write_bytes(b"a variant")
    (crowded / "teacher-state").mkdir()
    weights = dict(load_transformer(crowded).named_parameters())
    out = export_student(crowded, weights, tmp_path / "student", RECIPE)

    def files(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    assert files(out) == files(teacher) | {"README.md"}
    assert all(str(tmp_path) not in path.read_text() for path in out.rglob("*.json"))
    card = (out / "README.md").read_text()
    assert "text_encoder_3=None" in card
    assert "max_sequence_length=0" in card


def test_a_disk_that_refuses_is_told_in_one_sentence(teacher, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not write the student"):
        export_student(teacher, {}, tmp_path / "file" / "student", RECIPE)
