"""Models of the hub: only files that are loaded are fetched, and errors name the fix."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from commands import invoke
from diffusers import SD3Transformer2DModel
from hub_server import HubServer, hub_server
from huggingface_hub import constants
from tiny import distilled, make_teacher

from distill.config import load_config
from distill.errors import CheckpointError, ScorerError, TeacherError
from distill.evaluate.clip import Clip
from distill.models.geometry import read_geometry
from distill.models.hub import HubModel, fetch
from distill.models.sd3_files import MODELS
from distill.models.sd3_folder import SD3Folder
from distill.models.teacher import TRAINED_BY, open_teacher, pin_teacher
from distill.pipeline import OneStepPipeline
from distill.student.run_export import export_run
from distill.training.run_teacher import pin_teachers, read_config, write_pins
from distill.variants import pin_variants, read_variants

CARD = "---\nlicense: other\nlicense_name: acme-community\n---\nA tiny model.\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub and an empty cache. The library reads the environment only once, so its constants are set."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")  # fmt: skip # noqa: E501
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
        server.resume.set()


@pytest.fixture(scope="module")
def crowded(teacher_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as it is published: shards, variants, and many files that are not loaded."""
    folder = shutil.copytree(teacher_t5, tmp_path_factory.mktemp("published") / "crowded")
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer", local_files_only=True)
    transformer.save_pretrained(folder / "transformer", max_shard_size="150KB")
    for name in MODELS:
        for path in list((folder / name).glob("*model.safetensors")):
            shutil.copy(path, path.with_name(path.name.replace("model.", "model.fp16.")))
            (folder / name / "pytorch_model.bin").write_bytes(b"pickle")
            (folder / name / "model.onnx").write_bytes(b"onnx")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()  # a variant alone
    for name in ("sd3_tiny.safetensors", "sd3_tiny_incl_clips.ckpt", "comfy.json", "picture.png", "LICENSE.md"):
        (folder / name).write_bytes(b"not loaded")
    (folder / "README.md").write_text(CARD)
    return folder


def test_only_what_is_loaded_is_fetched(hub: HubServer, crowded: Path, tmp_path: Path) -> None:
    commit = hub.publish("acme/sd3.5-tiny", crowded)
    found = open_teacher("acme/sd3.5-tiny")
    plain = SD3Folder.read(crowded)
    assert (found.name, found.revision, found.digest) == ("acme/sd3.5-tiny", commit, plain.digest)
    shards = sorted(path.name for path in (crowded / "transformer").glob("*-of-*"))
    assert len(shards) > 1
    expected = {
        "README.md",
        "model_index.json",
        "onestep.json",
        "scheduler/scheduler_config.json",
        *(f"tokenizer{number}/tokenizer.json" for number in ("", "_2", "_3")),
        *(f"tokenizer{number}/tokenizer_config.json" for number in ("", "_2", "_3")),
        *(f"{name}/config.json" for name in MODELS),
        *(f"text_encoder{number}/model.safetensors" for number in ("", "_2", "_3")),
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        *(f"transformer/{name}" for name in shards),
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert {path.relative_to(found.path).as_posix() for path in found.path.rglob("*") if path.is_file()} == expected
    assert set(hub.fetched()) <= expected  # equal files are fetched once
    hub.requests.clear()
    assert open_teacher(f"acme/sd3.5-tiny@{commit}") == found
    assert hub.requests == []


def test_a_cached_model_needs_no_network(
    hub: HubServer, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = hub.publish("acme/tiny", teacher, "main", "v1", "release/2.0")
    found = open_teacher("acme/tiny@v1")
    assert open_teacher("acme/tiny@release/2.0") == found
    assert (found.path / "vae" / "config.json").is_symlink()
    hub.requests.clear()
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert open_teacher("acme/tiny@v1") == open_teacher(f"acme/tiny@{commit}") == found
        with pytest.raises(TeacherError, match=r"HF_HUB_OFFLINE is set; fetch it with .*distill fetch acme/tiny`"):
            open_teacher("acme/tiny")  # no commit of main is known
        (found.path / "vae" / "config.json").resolve().unlink()
        with pytest.raises(TeacherError, match=r"not wholly in the cache while HF_HUB_OFFLINE is set"):
            open_teacher("acme/tiny@v1")
    assert hub.requests == []
    assert open_teacher("acme/tiny@v1") == found  # what is missing is fetched
    assert hub.fetched() == ["vae/config.json"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert open_teacher("acme/tiny@v1") == found
    with pytest.raises(TeacherError, match=r"127.0.0.1:9 cannot be reached .*; check the network, HTTPS_PROXY"):
        open_teacher("acme/tiny")


def test_a_killed_download_goes_on_with_the_files_that_it_lacks(hub: HubServer, teacher: Path, tmp_path: Path) -> None:
    hub.publish("acme/tiny", teacher)
    hub.stalled = "transformer/diffusion_pytorch_model.safetensors"
    code = "from distill.models.hub import HubModel, fetch; fetch(HubModel('acme/tiny').resolve())"
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | own, stderr=subprocess.PIPE, text=True)
    assert hub.reached.wait(60)
    process.kill()
    _, errors = process.communicate()
    assert "fetching" in errors
    assert "%" not in errors  # no bar without a terminal
    hub.resume.set()
    hub.stalled = ""
    before = set(hub.fetched())
    hub.requests.clear()
    assert open_teacher("acme/tiny").digest == SD3Folder.read(teacher).digest
    assert "transformer/diffusion_pytorch_model.safetensors" in hub.fetched()
    assert "model_index.json" not in hub.fetched()
    assert "model_index.json" in before


def test_a_clip_model_is_fetched_before_it_is_used(
    hub: HubServer, clip_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    for name in ("pytorch_model.bin", "flax_model.msgpack", "README.md"):
        (folder / name).write_bytes(b"not loaded")
    hub.publish("acme/clip", folder, "main", "v1")
    found, cpu = Clip("acme/clip@v1", torch.device("cpu")), torch.device("cpu")
    assert sorted(hub.fetched()) == sorted(path.name for path in clip_folder.iterdir())
    assert (found.name, found.digest) == ("acme/clip@v1", Clip(clip_folder, cpu).digest)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found.texts(["a"]).shape == (1, 8)
    cached = next(Path(constants.HF_HUB_CACHE).glob("*clip/snapshots/*/model.safetensors"))
    cached.resolve().unlink()
    with pytest.raises(ScorerError, match=r"not wholly in the cache .* `HF_HUB_OFFLINE=0 hf download acme/clip --rev"):
        Clip("acme/clip@v1", cpu)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (folder / "model.safetensors").unlink()
    hub.publish("acme/pickled", folder)
    with pytest.raises(
        ScorerError, match=r"acme/pickled.* has no model.safetensors; only models with weights in safet"
    ):
        Clip("acme/pickled", cpu)


def test_a_gated_model_says_where_to_accept_and_how_to_log_in(
    hub: HubServer, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("acme/gated", teacher)
    hub.gated.add("acme/gated")
    accept = f"acme/gated is gated: accept its license at {hub.url}/acme/gated"
    with pytest.raises(TeacherError, match=f"{accept} and log in with `hf auth login` or HF_TOKEN"):
        open_teacher("acme/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(TeacherError, match=f"{accept} with the account of"):
        open_teacher("acme/gated")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert open_teacher("acme/gated").name == "acme/gated"


def _drop(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


UNUSABLE = {
    "holds a FluxPipeline, but only a Stable": lambda folder: (folder / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline"}'
    ),
    "has no model_index.json, .* or the path of its single file after `hf download acme/odd sd3.safetensors`": (
        lambda folder: ((folder / "model_index.json").unlink(), (folder / "sd3.safetensors").touch())
    ),
    "has no text_encoder/model.safetensors; only models with weights in safetensors": lambda folder: (
        folder / "text_encoder" / "model.safetensors"
    ).rename(folder / "text_encoder" / "pytorch_model.bin"),
    "needs 8796.1 GB in .* GB free; free space, or set HF_HOME": lambda folder: os.truncate(
        folder / "vae" / "diffusion_pytorch_model.safetensors", 1 << 43
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", UNUSABLE)
def test_a_model_that_cannot_be_used_is_refused_before_weights_are_fetched(
    sentence: str, hub: HubServer, teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher, tmp_path / "odd")
    UNUSABLE[sentence](folder)
    hub.publish("acme/odd", folder)
    with pytest.raises(TeacherError, match=rf"acme/odd\S* {sentence}"):
        open_teacher("acme/odd")
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("foo/bar", "'foo/bar' is neither a folder here nor a model of .* that this account sees"),
        ("acme/tiny@v9", "acme/tiny has no revision 'v9'; give a branch, tag or commit"),
        (f"acme/tiny@{'a' * 40}", "acme/tiny has no revision 'aaaa"),
        ("acme--bad/tiny..", "'acme--bad/tiny..' is neither a folder here nor a name of a model on the hub"),
    ],
)
def test_a_name_that_the_hub_does_not_know_is_refused(
    reference: str, sentence: str, hub: HubServer, teacher: Path
) -> None:
    hub.publish("acme/tiny", teacher)
    with pytest.raises(TeacherError, match=sentence):
        open_teacher(reference)


@pytest.mark.parametrize("path", ["a/b/c", "./acme/tiny", "../tiny", "/acme/tiny", "~/tiny", "tiny", "acme/", "a b/c",
                                  "acme/tiny.safetensors", "acme/tiny@", "C:/tiny", "~nobody-here/tiny"])  # fmt: skip
def test_a_path_is_never_taken_for_a_model_of_the_hub(path: str, hub: HubServer) -> None:
    with pytest.raises(TeacherError, match="there is no teacher"):
        open_teacher(path)
    assert pin_teacher(path) == path
    assert hub.requests == []


def test_a_folder_that_a_command_trains_is_no_model_of_the_hub(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, command in TRAINED_BY.items():
        with pytest.raises(TeacherError, match=f"no folder {folder}; train that teacher first with `{command}`"):
            open_teacher(folder)
    assert TRAINED_BY
    assert hub.requests == []


def test_a_folder_wins_over_a_model_of_the_hub(
    hub: HubServer, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "acme" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert open_teacher("acme/tiny").path == tmp_path / "acme" / "tiny"
    assert pin_teacher("acme/tiny") == "acme/tiny"
    assert hub.requests == []


def test_revisions_may_be_branches_with_slashes_and_pull_requests() -> None:
    assert HubModel.parse("acme/tiny@refs/pr/7") == HubModel("acme/tiny", "refs/pr/7")
    assert HubModel.parse("acme/tiny@release/2.0") == HubModel("acme/tiny", "release/2.0")
    assert HubModel.parse("acme/tiny@../../other") is None
    assert str(HubModel.parse("acme/sd3.5_m-x@v1.0")) == "acme/sd3.5_m-x@v1.0"


def test_a_run_keeps_its_commit_when_the_branch_moves(hub: HubServer, teacher: Path, tmp_path: Path) -> None:
    published = shutil.copytree(teacher, tmp_path / "published")
    (published / "README.md").write_text(CARD)
    commit = hub.publish("acme/tiny", published)
    out = distilled(Path("acme/tiny"), tmp_path)
    moved = hub.publish("acme/tiny", make_teacher(tmp_path / "moved", seed=1))
    assert distilled(Path("acme/tiny"), tmp_path) == out  # the teacher is the same
    record = json.loads((out / "student" / "onestep.json").read_text())
    assert (record["name"], record["teacher"], record["teacher_revision"]) == ("tiny-one-step", "acme/tiny", commit)
    assert record["config"]["teacher"] == f"acme/tiny@{commit}"
    card = (out / "student" / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["base_model"], header["license_name"]) == ("acme/tiny", "acme-community")
    assert f"student of `acme/tiny` at commit `{commit}`" in card
    assert OneStepPipeline.load(out / "student", "cpu").spec.teacher == "acme/tiny"
    assert pin_teachers(read_config(out), out) == {"acme/tiny": f"acme/tiny@{commit}"}
    with pytest.raises(CheckpointError, match=f"another teacher than acme/tiny@{moved}; give .* acme/tiny@{commit}"):
        export_run(out, tmp_path / "student", teacher=open_teacher("acme/tiny"))
    assert fetch(HubModel("acme/tiny", commit)) != fetch(HubModel("acme/tiny", moved))


def test_fetch_names_commit_and_place_and_plan_and_statistics_need_no_weights(
    hub: HubServer, teacher: Path, tmp_path: Path
) -> None:
    commit = hub.publish("acme/tiny", teacher)
    geometry = read_geometry("acme/tiny")
    assert (geometry.name, geometry.image_size) == ("acme/tiny", 16)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle")
    assert "tokenizer_2" in invoke("prompts", "stats", str(prompts), "--teacher", "acme/tiny").output
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]
    fetched = invoke("fetch", "acme/tiny")
    assert fetched.exit_code == 0
    folder = Path(constants.HF_HUB_CACHE) / "models--acme--tiny" / "snapshots" / commit
    assert re.search(rf"acme/tiny@{commit}: 0\.000\d+ GB in {folder}", fetched.output)


def test_a_cache_that_cannot_be_written_is_named(
    hub: HubServer, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.publish("acme/tiny", teacher)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(TeacherError, match=r"set HF_HOME to a folder that can be written, in place of .*/file/cache"):
        open_teacher("acme/tiny")


def test_variants_and_bases_keep_their_commits(hub: HubServer, teacher: Path, tmp_path: Path) -> None:
    commit = hub.publish("acme/tiny", teacher)
    variants = read_variants(["fgm", "dmd"], "scenes-debug", ["teacher=acme/tiny"], None)
    pinned = pin_variants(variants, tmp_path / "compare")
    config = load_config("scenes-debug", ["teacher=any.safetensors", "teacher_base=acme/tiny"])
    pins = pin_teachers(config, tmp_path / "run")
    write_pins(tmp_path / "run", pins)
    hub.publish("acme/tiny", teacher)
    assert pin_variants(variants, tmp_path / "compare") == pinned
    assert {variant.config.teacher for variant in pinned} == {f"acme/tiny@{commit}"}
    assert f"teacher=acme/tiny@{commit}" in pinned[1].command(tmp_path)
    assert pin_teachers(config, tmp_path / "run") == pins
    assert pins["acme/tiny"] == f"acme/tiny@{commit}"
