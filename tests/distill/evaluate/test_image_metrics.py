"""CLIP score, CMMD and FID of folders of images."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import CLIP_LENGTH, WORDS
from transformers import CLIPImageProcessorPil, CLIPModel
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import ConfigError, ScorerError
from distill.evaluate.clip import Clip
from distill.evaluate.generate import save_image
from distill.evaluate.image_files import read_pixels
from distill.evaluate.image_folder import find_images
from distill.evaluate.image_metrics import fid
from distill.evaluate.metrics import cmmd
from distill.worlds.tokenizer import build_clip_tokenizer


def invoke(*words: str | Path):
    return CliRunner().invoke(app, [*map(str, words), "--device", "cpu"], catch_exceptions=False)


def make_images(folder: Path, count: int, seed: int, bright: int = 255) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, bright, (20, 16, 3), dtype=np.uint8)
        save_image(Image.fromarray(pixels), ("a red circle", "a blue square")[i % 2], i, folder / f"{i}.png")
    return folder


def test_clip_score_is_the_models_cosine_and_cmmd_is_its_formula(clip_folder, tmp_path) -> None:
    made, real = make_images(tmp_path / "made", 6, 1), make_images(tmp_path / "real", 5, 2, bright=90)
    make_images(made / ".ipynb_checkpoints", 1, 3)
    (made / "grid.png").write_bytes((made / "0.png").read_bytes())  # neither is an image of the set
    result = invoke("score", made, "--clip", clip_folder, "--reference", real, "--json")
    found = json.loads(result.stdout)

    model, tokenizer = CLIPModel.from_pretrained(clip_folder), build_clip_tokenizer(WORDS, CLIP_LENGTH)
    pixels = [np.asarray(Image.open(path).copy()) for path in find_images(made)]
    batch = tokenizer(["a red circle", "a blue square"], padding=True, return_tensors="pt")
    inputs = CLIPImageProcessorPil.from_pretrained(clip_folder)(pixels, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch, **inputs).logits_per_image / model.logit_scale.exp()
    cosines = [max(0, float(logits[i, i % 2])) for i in range(6)]
    assert found["images"] == 6
    assert found["clip"] == "tiny-clip"
    assert found["clip_score"] == pytest.approx(100 * np.mean(cosines), abs=1e-4)
    low, high = found["clip_score_interval"]
    assert low <= found["clip_score"] <= high

    clip = Clip(clip_folder, torch.device("cpu"))
    x, y = (clip.images(map(read_pixels, find_images(folder))) for folder in (made, real))
    assert np.linalg.norm(x, axis=1) == pytest.approx(1)
    mean = [np.mean([[np.exp(-((a - b) @ (a - b)) / 200) for b in q] for a in p]) for p, q in ((x, x), (y, y), (x, y))]
    assert found["cmmd"] == pytest.approx(1000 * (mean[0] + mean[1] - 2 * mean[2]), abs=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    assert found["cmmd"] > 0.001


def test_what_is_missing_is_one_sentence(clip_folder, tmp_path) -> None:
    made = make_images(tmp_path / "made", 2, 1)
    with pytest.raises(ConfigError, match="--clip, or --inception"):
        invoke("score", made)
    with pytest.raises(ConfigError, match="--reference"):
        invoke("score", made, "--inception", tmp_path / "none")
    with pytest.raises(ScorerError, match="not a CLIP model"):
        invoke("score", made, "--clip", tmp_path)
    (tmp_path / "few").mkdir()
    with pytest.raises(ScorerError, match="holds 0 images"):
        find_images(tmp_path / "few")
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "few" / f"{i}.png")
    with pytest.raises(ScorerError, match="does not contain its prompt"):
        invoke("score", tmp_path / "few", "--clip", clip_folder)


def test_a_damaged_image_is_named(clip_folder, tmp_path) -> None:
    made = make_images(tmp_path / "made", 3, 1)
    whole = (made / "1.png").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no image"):  # the first still tells its size and its prompt
        (made / "1.png").write_bytes(damaged)
        with pytest.raises(ScorerError, match=r"1\.png cannot be decoded .*; replace or remove it"):
            invoke("score", made, "--clip", clip_folder)


def test_fid_takes_no_pickle_and_no_other_network(tmp_path) -> None:
    paths = find_images(make_images(tmp_path / "made", 2, 1))
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "inception.pth")
    save_file({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.safetensors")
    for name, words in (
        ("absent.safetensors", "not a safetensors file"),
        ("inception.pth", "not a safetensors file"),
        ("other.safetensors", "whose fc.weight is 1008 x 2048"),
    ):
        with pytest.raises(ScorerError, match=words):
            fid(paths, paths, tmp_path / name, torch.device("cpu"))


def test_fid_without_its_package_says_what_to_install(tmp_path) -> None:
    if find_spec("torch_fidelity"):
        pytest.skip("torch-fidelity is installed here")
    paths = find_images(make_images(tmp_path / "made", 2, 1))
    save_file({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "inception.safetensors")
    with pytest.raises(ScorerError, match=r"flow-generator-matching\[evaluation\]"):
        fid(paths, paths, tmp_path / "inception.safetensors", torch.device("cpu"))


def test_fid_is_a_distance_of_the_given_network_s_features(tmp_path) -> None:
    """A network of random weights in the form of the real one; the FID of two constant sets is that of their means."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3

    class Random(inception):
        def load_state_dict(self, *_):
            torch.manual_seed(0)
            for tensor in self.parameters():
                if tensor.ndim > 1:
                    torch.nn.init.kaiming_normal_(tensor)

    torch.save({}, tmp_path / "none.pth")
    network = Random("random", ["2048"], str(tmp_path / "none.pth"))
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    means = []
    for name, level in (("made", 0), ("real", 200)):
        image = np.linspace(level, 255, 20 * 16 * 3).astype(np.uint8).reshape(20, 16, 3)
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
        means.append(network(torch.from_numpy(image).permute(2, 0, 1)[None])[0][0].double())
    options = ("--reference", tmp_path / "real", "--inception", tmp_path / "inception.safetensors", "--json")
    found = json.loads(invoke("score", tmp_path / "made", *options).stdout)["fid"]
    assert found == pytest.approx(float((means[0] - means[1]).square().sum()), rel=1e-4)
