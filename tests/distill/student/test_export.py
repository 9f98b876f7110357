"""The student folder: stock diffusers and our pipeline give the same images."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from cards import run_card
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import PROMPTS, stock_pipeline

from distill.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    OutputError,
    ParityError,
    SizeError,
    TeacherError,
)
from distill.flow import noise, one_step
from distill.methods.base import ROLES
from distill.models.sd3 import load_transformer
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.pipeline import OneStepPipeline
from distill.student import parity
from distill.student.card import license_of
from distill.student.export import export_student
from distill.student.parity import check_parity
from distill.training.networks import Lora, SharedBase, build

CPU = torch.device("cpu")
RECIPE = {"name": "tiny-one-step", "method": "fgm", "images_seen": 12}


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose weights all differ a little from the teacher's."""
    torch.manual_seed(1)
    weights = {
        name: p + 0.02 * torch.randn_like(p) for name, p in load_transformer(SD3Folder.read(teacher)).named_parameters()
    }
    return export_student(
        SD3Folder.read(teacher), weights, tmp_path_factory.mktemp("students") / "full", RECIPE, dtype=torch.float32
    )


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
    found = ours.latents(ours.encode(PROMPTS), ours.noise(seeds))
    expected = stock_latents(stock_pipeline(student), PROMPTS, noise(seeds, (4, 8, 8)), ours.spec.max_sequence_length)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def adapted(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SharedBase, Path]:
    """An adapter whose alpha is twice its rank, and the student that it was exported to."""
    torch.manual_seed(2)
    networks = build(SD3Folder.read(teacher), Lora(rank=4, alpha=8), torch.float32, CPU)
    assert isinstance(networks, SharedBase)
    for role in ROLES:
        for tensor in networks.trainable(role).values():
            tensor.data += 0.05 * torch.randn(tensor.shape)
    out = tmp_path_factory.mktemp("students") / "lora"
    return networks, export_student(
        SD3Folder.read(teacher), networks.trainable("student"), out, RECIPE, Lora(rank=4, alpha=8), torch.float32
    )


def test_an_adapter_is_merged_and_also_loads_into_the_teacher(adapted, teacher):
    networks, out = adapted
    ours = OneStepPipeline.load(out)
    z, cond = noise(range(4), (4, 8, 8)), ours.encode(PROMPTS)
    trained = one_step(networks.velocity("student"), z, cond).detach()
    base = one_step(networks.velocity("teacher"), z, cond).detach()
    assert (trained - base).abs().max() > 0.01
    torch.testing.assert_close(ours.latents(cond, ours.noise(range(4))), trained, atol=1e-4, rtol=1e-4)

    stock = stock_pipeline(teacher)
    stock.load_lora_weights(out, local_files_only=True)
    torch.testing.assert_close(stock_latents(stock, PROMPTS, z, 0), trained, atol=1e-4, rtol=1e-4)


def test_an_adapter_file_is_what_comfyui_loads(adapted, teacher):
    """Its SD3 loader takes diffusers' module names after `transformer.`, adds B A, and scales by `.alpha` tensors."""
    _, out = adapted
    attention = r"attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    block = rf"{attention}|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear"
    other = r"context_embedder|proj_out|norm_out\.linear|time_text_embed\.(timestep|text)_embedder\.linear_[12]"
    known = re.compile(rf"transformer\.(transformer_blocks\.\d+\.({block})|{other})\.lora_[AB]\.weight")
    with safe_open(out / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"format"}
        lora = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = {found[1] for found in map(known.fullmatch, lora) if found}
    assert len(lora) == 2 * len(names)
    merged, base = (load_transformer(SD3Folder.read(folder)).state_dict() for folder in (out, teacher))
    for name in names:
        a, b = (lora[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + b @ a)
    changed = {name.removesuffix(".weight") for name in base if not torch.equal(base[name], merged[name])}
    assert changed == names


def test_a_big_transformer_is_cut_into_shards_that_are_checked(teacher, student, tmp_path):
    weights = dict(load_transformer(SD3Folder.read(student)).named_parameters())
    out = export_student(
        SD3Folder.read(teacher), weights, tmp_path / "cut", RECIPE, dtype=torch.float32, max_shard_size="100KB"
    )
    shards = sorted((out / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    whole, cut = OneStepPipeline.load(student), OneStepPipeline.load(out)
    assert SD3Folder.read(out).parameters == SD3Folder.read(student).parameters
    assert torch.equal(*(each.latents(each.encode(PROMPTS), each.noise(range(4))) for each in (cut, whole)))
    assert check_parity(out) < 1e-4

    before = SD3Folder.read(out).digest
    with shards[1].open("r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        file.seek(8 + header)  # the first number of the first tensor
        file.write(b"\x01\x02\x03\x04")
    assert SD3Folder.read(out).digest != before
    shards[1].unlink()
    with pytest.raises(TeacherError, match=shards[1].name):
        SD3Folder.read(out)
    index = out / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    with pytest.raises(TeacherError, match="files beside it"):
        SD3Folder.read(out)


def test_a_folder_that_stock_diffusers_runs_otherwise_fails_the_check(student, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)  # what would make a difference is refused when it is read
    with pytest.raises(ParityError, match=str(student)):
        check_parity(student)


def test_the_card_bears_a_license(teacher, tmp_path):
    weights = dict(load_transformer(SD3Folder.read(teacher)).named_parameters())

    def header(**options):
        text = (
            export_student(SD3Folder.read(teacher), weights, tmp_path / "student", RECIPE, **options) / "README.md"
        ).read_text()
        return yaml.safe_load(text.split("---")[1])

    assert "license" not in header()
    assert header(license="apache-2.0")["license"] == "apache-2.0"
    shared = shutil.copytree(teacher, tmp_path / "shared")
    named = {"license": "other", "license_name": "community", "license_link": "LICENSE.md"}
    (shared / "README.md").write_text(f"---\n{yaml.safe_dump(named)}---\n# Teacher\n")
    assert license_of(shared) == named
    out = export_student(SD3Folder.read(shared), weights, tmp_path / "of-shared", RECIPE)
    assert license_of(out) == named


def test_a_size_of_shards_that_is_none_is_refused(teacher, tmp_path):
    with pytest.raises(ConfigError, match="5GB"):
        export_student(SD3Folder.read(teacher), {}, tmp_path / "student", RECIPE, max_shard_size="big")


def test_weights_that_are_not_finite_are_not_exported(teacher, tmp_path):
    weights = {name: p.detach().clone() for name, p in load_transformer(SD3Folder.read(teacher)).named_parameters()}
    weights["proj_out.bias"][1] = float("nan")
    with pytest.raises(DivergedError, match=r"proj_out\.bias is not finite"):
        export_student(SD3Folder.read(teacher), weights, tmp_path / "student", RECIPE)
    weights["proj_out.bias"][1] = 1e5
    with pytest.raises(DivergedError, match=r"proj_out\.bias is too large for torch\.float16; .*bf16"):
        export_student(SD3Folder.read(teacher), weights, tmp_path / "student", RECIPE)
    assert list(tmp_path.iterdir()) == []
    export_student(SD3Folder.read(teacher), weights, tmp_path / "student", RECIPE, dtype=torch.bfloat16)


PARTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_not_finite_are_not_loaded(part, student, tmp_path):
    folder = shutil.copytree(student, tmp_path / "damaged")
    tensors = load_file(folder / part / PARTS[part])
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] = float("inf")
    save_file(tensors, folder / part / PARTS[part], {"format": "pt"})
    with pytest.raises(TeacherError, match=f"{part}: {name} is not finite"):
        OneStepPipeline.load(folder)


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
    readers = student.stat().st_mode & 0o444
    assert all(path.stat().st_mode & 0o444 == readers for path in student.rglob("*"))  # a server is often another user
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
    weights = dict(load_transformer(SD3Folder.read(teacher)).named_parameters())
    out = export_student(SD3Folder.read(teacher), weights, tmp_path / "student", RECIPE)
    export_student(SD3Folder.read(teacher), weights, out, {**RECIPE, "images_seen": 13})
    assert OneStepPipeline.load(out).spec.images_seen == 13
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert SD3TextEncoder.load(SD3Folder.read(out)).encode([""]).embeds.shape == (1, 8, 48)


def _documents(folder: Path, teacher: Path, student: Path) -> Path:
    (folder / "letters").mkdir(parents=True)
    (folder / "letters" / "a.txt").write_text("mine")
    return folder


def _models(folder: Path, teacher: Path, student: Path) -> Path:
    shutil.copytree(student, folder / "one")
    return folder


def _link(folder: Path, teacher: Path, student: Path) -> Path:
    folder.symlink_to(_documents(folder.with_name("target"), teacher, student))
    return folder


def _student_with(name: str):
    def make(folder: Path, teacher: Path, student: Path) -> Path:
        shutil.copytree(student, folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        return folder

    return make


def _file(folder: Path, teacher: Path, student: Path) -> Path:
    folder.write_text("mine")
    return folder


def _renamed(folder: Path, teacher: Path, student: Path) -> Path:
    (folder / "onestep.json").parent.mkdir()
    (folder / "onestep.json").write_text('{"start_time": 1.0}')
    return folder


@pytest.mark.parametrize(
    "make",
    [
        _documents,
        _models,
        _link,
        _file,
        _renamed,
        _student_with("notes.txt"),
        _student_with(".git/config"),
        _student_with("transformer/notes.txt"),
        _student_with("vae/old/config.json"),
        lambda folder, teacher, student: shutil.copytree(teacher, folder),
        lambda folder, teacher, student: shutil.copytree(teacher, folder / "inside").parent,
    ],
)
def test_an_export_replaces_nothing_but_a_student(make, teacher, student, tmp_path):
    out = make(tmp_path / "out", teacher, student)

    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    with pytest.raises(OutputError, match=re.escape(str(out))):
        export_student(
            SD3Folder.read(teacher), dict(load_transformer(SD3Folder.read(teacher)).named_parameters()), out, RECIPE
        )
    assert contents() == before


def test_an_export_goes_to_an_empty_folder_and_through_a_link_and_never_onto_its_teacher(teacher, student, tmp_path):
    weights = dict(load_transformer(SD3Folder.read(teacher)).named_parameters())
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for images in (1, 2):
        export_student(SD3Folder.read(teacher), weights, tmp_path / "link", {**RECIPE, "images_seen": images})
        assert OneStepPipeline.load(tmp_path / "empty").spec.images_seen == images
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "link"}
    with pytest.raises(OutputError, match="folder of the teacher"):
        export_student(SD3Folder.read(tmp_path / "empty"), weights, tmp_path / "link", RECIPE)
    assert OneStepPipeline.load(tmp_path / "empty").spec.images_seen == 2


def test_only_what_stock_loads_is_copied_and_no_path_of_this_machine_with_it(teacher, tmp_path):
    crowded = shutil.copytree(teacher, tmp_path / "crowded")
    (crowded / "whole_model.safetensors").write_bytes(b"twice the size")
    (crowded / "text_encoder" / "model.fp16.safetensors").write_bytes(b"a variant")
    (crowded / "teacher-state").mkdir()
    weights = dict(load_transformer(SD3Folder.read(crowded)).named_parameters())
    out = export_student(SD3Folder.read(crowded), weights, tmp_path / "student", RECIPE)

    def files(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    assert files(out) == files(teacher) | {"README.md"}
    assert all(str(tmp_path) not in path.read_text() for path in out.rglob("*.json"))
    ours, stock = run_card(out)  # without T5
    assert ours["images"].shape == (1, 16, 16, 3)
    assert stock["image"].size == (16, 16)


def test_a_disk_that_refuses_is_told_in_one_sentence(teacher, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not write the student"):
        export_student(SD3Folder.read(teacher), {}, tmp_path / "file" / "student", RECIPE)
