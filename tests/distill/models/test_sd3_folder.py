"""Model folders are read and checked; incomplete and unsupported ones are refused with the reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import run_card
from safetensors.torch import load_file, save_file
from tiny import PROMPTS, make_teacher, stock_pipeline, undistilled

from distill.errors import TeacherError
from distill.models.sd3 import (
    load_transformer,
    load_vae,
)
from distill.models.sd3_files import MODELS
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.student.export import export_student


def test_the_spec_has_the_folders_numbers(teacher: Path, teacher_t5: Path) -> None:
    spec = SD3Folder.read(teacher)
    assert (spec.latent_shape, spec.image_size, spec.text_shape) == ((4, 8, 8), 16, (8, 48))
    assert (spec.max_sequence_length, spec.has_t5, spec.shift) == (0, False, 3.0)
    assert (spec.scaling_factor, spec.shift_factor, spec.guidance) == (1.5, 0.06, 7.0)
    assert spec.parameters == sum(p.numel() for p in load_transformer(SD3Folder.read(teacher)).state_dict().values())
    assert SD3Folder.read(teacher_t5).text_shape == (14, 48)


def test_a_folder_without_a_record_takes_the_stock_length(tmp_path: Path) -> None:
    assert SD3Folder.read(make_teacher(tmp_path, max_sequence_length=None)).max_sequence_length == 256


def test_the_digest_follows_the_weights_and_not_the_place(teacher: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(teacher, tmp_path / "copy")
    assert SD3Folder.read(copy).digest == SD3Folder.read(teacher).digest
    assert SD3Folder.read(make_teacher(tmp_path / "other", seed=1)).digest != SD3Folder.read(teacher).digest


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
    "cannot be read as JSON .maximum recursion": lambda folder: (folder / "model_index.json").write_text("[" * 100_000),
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


SCHEDULER = "scheduler/scheduler_config.json"
SETTINGS = [
    (SCHEDULER, {"num_train_timesteps": 500}, "sets num_train_timesteps to 500; only 1000"),
    (SCHEDULER, {"_class_name": "DPMSolverMultistepScheduler"}, "is of a DPMSolverMultistepScheduler"),
    (SCHEDULER, {"use_karras_sigmas": True}, "sets use_karras_sigmas"),
    (SCHEDULER, {"shift_terminal": 0.1}, "sets shift_terminal"),
    (SCHEDULER, {"stochastic_sampling": True}, "sets stochastic_sampling"),
    (SCHEDULER, {"prediction_type": "v_prediction"}, "sets prediction_type"),
    (SCHEDULER, {"shift": 0}, "the scheduler's shift is not a positive number"),
    (SCHEDULER, {"shift": float("nan")}, "the scheduler's shift is not a positive number"),
    ("vae/config.json", {"_class_name": "AutoencoderKLWan"}, "is of a AutoencoderKLWan"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is not a positive number"),
    ("vae/config.json", {"latent_channels": 16}, "latent_channels are not the transformer's in_channels"),
    ("vae/config.json", {"out_channels": 1}, "not RGB"),
    ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "is of a FluxTransformer2DModel"),
    ("transformer/config.json", {"out_channels": 8}, "out_channels are not its in_channels"),
    ("transformer/config.json", {"pooled_projection_dim": 41}, "sum of the CLIPs' projection_dim"),
    ("transformer/config.json", {"sample_size": 26}, "sample_size is over pos_embed_max_size"),
    ("transformer/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized weights"),
    ("text_encoder/config.json", {"architectures": ["CLIPTextModel"]}, "CLIPTextModelWithProjection is what can be"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "model_max_length is over the CLIPs' positions"),
    ("onestep.json", {"max_sequence_length": -1}, "max_sequence_length is negative"),
    ("onestep.json", {"guidance": float("inf")}, "guidance is not a number"),
]


@pytest.mark.parametrize(("name", "change", "sentence"), SETTINGS)
def test_a_setting_that_is_not_followed_is_refused(name, change, sentence, teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "other")
    _edit(folder / name, **change)
    with pytest.raises(TeacherError, match=sentence):
        SD3Folder.read(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype: torch.dtype, teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "other")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "proj_out.weight": tensors["proj_out.weight"].to(dtype)}, path)
    with pytest.raises(TeacherError, match=r"holds quantized weights .*; give the plain model"):
        SD3Folder.read(folder)


def test_only_files_that_are_loaded_count_and_are_copied(teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "crowded")
    for name in (*MODELS, "scheduler", "tokenizer", "."):
        if not (folder / name).is_dir():
            continue
        for stray in (
            "README.txt",
            "notes.json",
            "._config.json",
            "._model.safetensors",
            ".DS_Store",
            "generation_config.json",
        ):
            (folder / name / stray).write_bytes(b"\0mac")
        (folder / name / "._diffusion_pytorch_model.safetensors").write_bytes(b"\0mac")
        (folder / name / "older.safetensors").write_bytes(b"\0mac")
        (folder / name / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    for name in ("text_encoder", "text_encoder_2"):  # transformers takes the whole file before an index
        (folder / name / "model.safetensors.index.json").write_text('{"weight_map": {"a": "nowhere.safetensors"}}')
    _edit(folder / "model_index.json", safety_checker=["elsewhere", "Checker"], image_encoder=["transformers", "X"])
    assert SD3Folder.read(folder).digest == SD3Folder.read(teacher).digest
    weights = dict(load_transformer(SD3Folder.read(folder)).named_parameters())
    out = export_student(
        SD3Folder.read(folder), weights, tmp_path / "student", {"name": "tiny", "method": "fgm", "images_seen": 1}
    )
    plain = {path.relative_to(teacher) for path in teacher.rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == plain | {Path("README.md")}
    stock_pipeline(out)


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder_2", "tokenizer"])
def test_every_file_that_is_loaded_counts(name: str, teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "changed")
    (path,) = (path for path in (folder / name).iterdir() if path.name in ("config.json", "tokenizer.json"))
    path.write_text(path.read_text() + " ")
    assert SD3Folder.read(folder).digest != SD3Folder.read(teacher).digest


def test_variants_are_loaded_and_become_plain_files_of_a_student(teacher_t5: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher_t5, tmp_path / "variant")
    for name in MODELS:
        for path in (folder / name).glob("*model.safetensors"):
            path.rename(path.with_name(path.name.replace("model.", "model.fp16.")))
    encoder = folder / "text_encoder_3"
    (encoder / "model.fp16.safetensors").rename(encoder / "model.fp16-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(encoder / "model.fp16-00001-of-00001.safetensors"),
                                                         "model.fp16-00001-of-00001.safetensors")}  # fmt: skip
    (encoder / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    encoded = SD3TextEncoder.load(SD3Folder.read(folder)).encode(PROMPTS)
    expected = SD3TextEncoder.load(SD3Folder.read(teacher_t5)).encode(PROMPTS)
    assert encoded.embeds.equal(expected.embeds)
    weights = load_transformer(SD3Folder.read(folder)).state_dict()
    assert all(
        weights[name].equal(tensor)
        for name, tensor in load_transformer(SD3Folder.read(teacher_t5)).state_dict().items()
    )
    for _ in range(2):  # the second replaces the first
        out = export_student(
            SD3Folder.read(folder), weights, tmp_path / "student", {"name": "tiny", "method": "fgm", "images_seen": 1}
        )
    assert not list(out.rglob("*fp16.*"))
    assert SD3TextEncoder.load(SD3Folder.read(out)).encode(PROMPTS).embeds.equal(expected.embeds)
    assert load_vae(SD3Folder.read(out)).config.scaling_factor == load_vae(SD3Folder.read(folder)).config.scaling_factor
    stock_pipeline(out)


def test_the_card_of_a_student_runs_if_its_files_are_fp16(teacher_t5: Path, tmp_path: Path) -> None:
    """transformers keeps the precision of files, diffusers loads fp32. Other tests run cards of fp32 and bf16."""
    folder = shutil.copytree(teacher_t5, tmp_path / "teacher")
    for path in folder.glob("text_encoder*/model.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
        config = path.with_name("config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    out = undistilled(folder, tmp_path / "out")
    ours, stock = run_card(out)
    assert ours["images"].shape == (1, 16, 16, 3)
    assert stock["image"].size == (16, 16)


def _as_half(model: Any, folder: Path, variant: str) -> None:
    """Replace a component's weights with those that its library writes of a variant, in several files."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    model.to(dtype).save_pretrained(folder, variant=variant, max_shard_size="40KB")
    assert len(list(folder.glob("*-of-*"))) > 1


def _legacy_shards(folder: Path) -> None:
    """Name shards as diffusers did before 0.32: model-00001-of-00002.fp16.safetensors."""
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    for path in folder.glob("*-of-*"):
        stem, part = path.name.removesuffix(".safetensors").split(".fp16")
        legacy = f"{stem}{part}.fp16.safetensors"
        index.write_text(index.read_text().replace(path.name, legacy))
        path.rename(folder / legacy)


def test_each_component_may_have_its_own_variant_in_several_files(teacher_t5: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher_t5, tmp_path / "mixed.v1")
    plain = SD3Folder.read(teacher_t5)
    encoder = SD3TextEncoder.load(plain)
    expected = {name: p.to(torch.float16).float() for name, p in load_transformer(plain).state_dict().items()}
    _as_half(load_transformer(plain), folder / "transformer", "fp16")
    _legacy_shards(folder / "transformer")
    _as_half(encoder.t5, folder / "text_encoder_3", "bf16")
    _as_half(load_vae(plain), folder / "vae", "bf16")
    spec = SD3Folder.read(folder)
    assert spec.parameters == plain.parameters
    weights = load_transformer(spec).state_dict()
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    assert load_vae(spec).config.scaling_factor == 1.5
    assert SD3TextEncoder.load(spec).encode(PROMPTS).embeds.allclose(encoder.encode(PROMPTS).embeds, atol=0.1)
    out = export_student(spec, weights, tmp_path / "student", {"name": "tiny", "method": "fgm", "images_seen": 1})
    assert (
        SD3TextEncoder.load(SD3Folder.read(out))
        .encode(PROMPTS[:1])
        .embeds.equal(SD3TextEncoder.load(spec).encode(PROMPTS[:1]).embeds)
    )
    assert load_vae(SD3Folder.read(out)).state_dict().keys() == load_vae(spec).state_dict().keys()
    assert len(run_card(out)) == 2


def test_links_to_files_and_folders_are_followed(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    (folder / "vae").mkdir(parents=True)
    for path in teacher.iterdir():
        if path.name != "vae":
            (folder / path.name).symlink_to(path)
    for path in (teacher / "vae").iterdir():
        (folder / "vae" / path.name).symlink_to(path)
    assert SD3Folder.read(folder).digest == SD3Folder.read(teacher).digest
    (tmp_path / "link").symlink_to(folder)
    assert SD3Folder.read(tmp_path / "link").path == folder


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "vae",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/special_tokens_map.json",
        "text_encoder/model.safetensors",
    ],
)
def test_a_link_to_nothing_is_named(name: str, teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "broken")
    path = folder / name
    if path.exists():
        path.rename(tmp_path / "moved") if path.is_dir() else path.unlink()
    path.symlink_to("../../blobs/gone")
    if name.startswith("text_encoder"):  # not replaced silently by a variant
        shutil.copy(teacher / name, path.with_name("model.fp16.safetensors"))
    with pytest.raises(TeacherError, match=f"{name} is a link to ../../blobs/gone, which does not exist"):
        SD3Folder.read(folder)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin is not loaded: save the pipeline in safetensors"),
        ("sd3-Q4_0.gguf", "sd3-Q4_0.gguf is not loaded"),
        (
            "diffusion_pytorch_model.safetensors.fp16.index.json",
            "rename diffusion_pytorch_model.safetensors.fp16.index.json to "
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
    ],
)
def test_weights_in_another_form_are_named_with_what_to_do(
    name: str, sentence: str, teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher, tmp_path / "other")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(folder / "transformer" / name)
    with pytest.raises(TeacherError, match=f"has no diffusion_pytorch_model.safetensors; {sentence}"):
        SD3Folder.read(folder)


def test_a_t5_that_was_not_fetched_is_named_with_what_to_do(teacher_t5: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher_t5, tmp_path / "without")
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
        with pytest.raises(TeacherError, match=r"fetch it, or set .* to \[null, null\] in model_index.json"):
            SD3Folder.read(folder)
    _edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    assert not SD3Folder.read(folder).has_t5


@pytest.mark.parametrize(
    "name",
    ["model_index.json", "vae/config.json", "tokenizer/tokenizer.json", "text_encoder/model.safetensors"],
)
def test_a_pointer_of_git_lfs_is_named(name: str, teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "cloned")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(TeacherError, match=f"{name} is a pointer of Git LFS .*`git lfs pull`"):
        SD3Folder.read(folder)


def test_a_revision_of_the_hub_s_cache_has_the_model_s_name(teacher: Path, tmp_path: Path) -> None:
    revision = "b1148b4028b9ec56ebd36444c193d56aeff7ab56"
    snapshot = tmp_path / "models--stabilityai--stable-diffusion-3-medium-diffusers" / "snapshots" / revision
    shutil.copytree(teacher, snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    assert (
        SD3Folder.read(snapshot).name == SD3Folder.read(tmp_path / "link").name == "stable-diffusion-3-medium-diffusers"
    )
    assert SD3Folder.read(shutil.copytree(teacher, tmp_path / revision)).name == "sd3-b1148b40"
    assert SD3Folder.read(shutil.copytree(teacher, tmp_path / "mine")).name == "mine"


@pytest.mark.parametrize("sentence", DAMAGE)
def test_a_folder_that_is_not_whole_is_refused(sentence: str, teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "damaged")
    DAMAGE[sentence](folder)
    with pytest.raises(TeacherError, match=sentence) as caught:
        SD3Folder.read(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_a_tokenizer_without_words_is_refused(name: str, teacher_t5: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher_t5, tmp_path / "teacher")
    words = folder / name / "tokenizer.json"
    words.write_text("{}")
    with pytest.raises(TeacherError, match=f"{name} holds no usable tokenizer"):
        SD3TextEncoder.load(SD3Folder.read(folder))
    words.unlink()
    with pytest.raises(TeacherError, match=f"{name} has neither tokenizer.json nor"):
        SD3Folder.read(folder)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="is not a folder"):
        SD3Folder.read(tmp_path / "nothing")
