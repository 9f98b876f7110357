"""Checkpoints in one file are read by diffusers and by this package, and give the same images."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from tiny import SD3_KINDS, make_transformer, stock_pipeline

from distill.config import load_config
from distill.errors import OutputError, TeacherError
from distill.files import _left
from distill.models.sd3_folder import SD3Folder
from distill.models.single_file import write_single_file
from distill.models.teacher import open_teacher
from distill.training.run_teacher import read_teacher

WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMER = "model.diffusion_model."


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "flow-generator-matching" / "teachers"


@pytest.fixture(scope="module")
def models(teacher_t5, tmp_path_factory):
    """A folder of each kind of SD3; the projection of the first CLIP is the identity, as in the published models."""
    made = {}
    for kind, geometry in SD3_KINDS.items():
        folder = shutil.copytree(teacher_t5, tmp_path_factory.mktemp("models") / kind)
        torch.manual_seed(1)
        make_transformer(**geometry).save_pretrained(folder / "transformer")
        clip = folder / "text_encoder" / "model.safetensors"
        save_file(load_file(clip) | {"text_projection.weight": torch.eye(16)}, clip, {"format": "pt"})
        made[kind] = folder
    return made


@pytest.fixture(scope="module")
def base(models, tmp_path_factory):
    """A base of sd3.5-medium with other weights, without a transformer: the weights must come from the file."""
    folder = shutil.copytree(models["sd3.5-medium"], tmp_path_factory.mktemp("bases") / "base")
    for path in folder.rglob("*.safetensors"):
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    (folder / "transformer" / WEIGHTS).unlink()
    return folder


@pytest.fixture(scope="module")
def single_file(models, tmp_path_factory):
    """The file of sd3.5-medium, with text encoders."""
    path = tmp_path_factory.mktemp("files") / "medium-3.5.safetensors"
    return write_single_file(SD3Folder.read(models["sd3.5-medium"]), path, text_encoders=True)


def images(pipeline):
    generator = torch.Generator().manual_seed(0)
    made = pipeline("a red circle", num_inference_steps=1, generator=generator, output_type="np", max_sequence_length=6)
    return torch.from_numpy(made.images)


@pytest.mark.parametrize("kind", SD3_KINDS)
def test_a_pipeline_of_the_file_makes_the_same_images(kind, models, tmp_path):
    folder = models[kind]
    path = write_single_file(SD3Folder.read(folder), tmp_path / "any.safetensors")
    assert all(name.startswith((TRANSFORMER, "first_stage_model.")) for name in load_file(path))
    stock = stock_pipeline(folder)
    expected = images(stock)
    for name, part in (("transformer", SD3Transformer2DModel), ("vae", AutoencoderKL)):
        read = part.from_single_file(str(path), config=str(folder), subfolder=name, local_files_only=True)
        stock.register_modules(**{name: read})
    assert images(stock).equal(expected)


def test_a_file_is_opened_as_the_folder_that_it_was_written_from(single_file, models, base, cache):
    opened = open_teacher(single_file, str(base))
    assert (opened.name, opened.max_sequence_length) == ("medium-3.5", 6)
    assert (opened.path / "scheduler").resolve() == base / "scheduler"
    assert images(stock_pipeline(opened.path)).equal(images(stock_pipeline(models["sd3.5-medium"])))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert open_teacher(single_file, str(base)) == opened
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_what_the_file_lacks_comes_from_the_base_and_prefixes_may_be_absent(single_file, base, tmp_path, caplog):
    tensors = load_file(single_file)
    bare = {name.removeprefix(TRANSFORMER): tensor for name, tensor in tensors.items() if TRANSFORMER in name}
    t5 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items() if "t5xxl" in name}
    save_file({name: tensor.half() for name, tensor in bare.items()} | t5, tmp_path / "bare.safetensors")
    opened = open_teacher(tmp_path / "bare.safetensors", str(base))
    weights = load_file(opened.path / "transformer" / WEIGHTS)
    assert weights["proj_out.weight"].equal(bare["final_layer.linear.weight"].half())
    assert "text_encoder_3 of" in caplog.text  # it is in 8 bits
    for part in ("vae", "text_encoder", "text_encoder_3", "tokenizer_3"):
        assert (opened.path / part).resolve() == base / part


def test_a_run_opens_its_teacher_with_its_base(single_file, base, tmp_path):
    config = load_config("scenes-debug", [f"teacher={single_file}", f"teacher_base={base}"])
    assert read_teacher(config, tmp_path).name == "medium-3.5"
    assert not {"teacher", "teacher_base"} & config.identity().keys()


def test_a_conversion_that_was_killed_begins_anew(single_file, base, cache):
    opened = open_teacher(single_file, str(base))
    left = opened.path.rename(cache / f".{opened.path.name}.99999999.distill-partial")
    _left.cache_clear()  # as in a new process
    (left / "model_index.json").unlink()
    assert open_teacher(single_file, str(base)) == opened
    assert not left.exists()


def test_two_processes_convert_a_file_once(single_file, models, cache):
    before = set(cache.iterdir())
    with ThreadPoolExecutor(2) as pool:  # each opens the lock's file by itself, as processes do
        first, second = pool.map(open_teacher, [single_file] * 2, [str(models["sd3.5-medium"])] * 2)
    assert first == second
    assert {path for path in set(cache.iterdir()) - before if path.is_dir()} == {first.path}


def test_without_a_base_the_error_says_what_is_lacking(single_file):
    with pytest.raises(
        TeacherError, match=r"transformer, vae, text_encoder.*no tokenizers.*--teacher-base: .*3\.5-medium"
    ):
        open_teacher(single_file)


def test_a_base_completes_a_file_only(models):
    with pytest.raises(TeacherError, match=r"--teacher-base\) completes a single file"):
        open_teacher(models["sd3-medium"], str(models["sd3-medium"]))


@pytest.mark.parametrize("other", ["sd3-medium", "sd3.5-large"])
def test_a_base_of_another_model_is_refused_by_the_first_tensor(other, single_file, models):
    with pytest.raises(TeacherError, match=rf"model\.diffusion_model\.joint_blocks\.\d\..*{other}"):
        open_teacher(single_file, str(models[other]))


def test_tensors_in_another_shape_are_refused_by_name(single_file, base, tmp_path):
    for name in (
        "first_stage_model.decoder.conv_out.weight",
        "text_encoders.clip_g.transformer.text_projection.weight",
    ):
        path = tmp_path / "other.safetensors"
        save_file(load_file(single_file) | {name: torch.zeros(2, 2)}, path)
        with pytest.raises(TeacherError, match=name):
            open_teacher(path, str(base))
    with pytest.raises(TeacherError, match="that file does not exist"):
        open_teacher(tmp_path / "moved.safetensors", str(base))


def test_other_files_are_refused(single_file, base, tmp_path):
    tensors = load_file(single_file)
    first = f"{TRANSFORMER}final_layer.linear.weight"
    (tmp_path / "old.ckpt").write_bytes(b"any")
    save_file(tensors | {first: tensors[first].to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    save_file({"lora_unet_any.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(single_file.read_bytes()[:-4])
    for name, match in {
        "old.ckpt": "only safetensors are loaded",
        "fp8.safetensors": r"quantized weights \(F8_E4M3\)",
        "lora.safetensors": "no transformer of Stable Diffusion 3",
        "cut.safetensors": "truncated",
    }.items():
        with pytest.raises(TeacherError, match=match):
            open_teacher(tmp_path / name, str(base))


def test_a_cache_that_cannot_be_written_is_named(single_file, base, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(OutputError, match="set XDG_CACHE_HOME"):
        open_teacher(single_file, str(base))


def test_a_projection_that_the_layout_cannot_hold_is_refused(teacher_t5, tmp_path):
    with pytest.raises(TeacherError, match=r"text_projection\.weight is not the identity"):
        write_single_file(SD3Folder.read(teacher_t5), tmp_path / "any.safetensors", text_encoders=True)
    assert not (tmp_path / "any.safetensors").exists()


def test_the_file_keeps_the_precision_of_the_folder(models, tmp_path):
    folder = shutil.copytree(models["sd3-medium"], tmp_path / "mixed")
    path = folder / "transformer" / WEIGHTS
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    written = load_file(write_single_file(SD3Folder.read(folder), tmp_path / "mixed.safetensors"))
    assert {tensor.dtype for name, tensor in written.items() if name.startswith(TRANSFORMER)} == {torch.bfloat16}
    assert written["first_stage_model.encoder.conv_in.weight"].dtype == torch.float32
