"""CIFAR-10 in pixels: its files are read to the byte, pixels survive their autoencoder, and the whole path runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import stock_pipeline
from typer.testing import CliRunner

from distill.cli import app
from distill.data.image_cache import ImageCache, encode_examples
from distill.data.images import read_examples
from distill.errors import ImageError, OutputError
from distill.models.sd3 import decode_latents, encode_images
from distill.models.sd3_folder import SD3Folder
from distill.models.vae import to_pixels
from distill.worlds.cifar10.data import CLASSES, read_images, write_images
from distill.worlds.cifar10.recipe import Cifar10Recipe
from distill.worlds.cifar10.teacher import check_teacher_folder, train_teacher
from distill.worlds.identity import identity_autoencoder

CPU = torch.device("cpu")
FILES = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins in CIFAR-10's own format: records of a label, then the red, green and blue planes, row by row."""
    folder = tmp_path_factory.mktemp("cifar-10-batches-bin")
    rng = np.random.default_rng(0)
    for name in FILES:
        records = b""
        for _ in range(3):
            label = int(rng.integers(10))
            planes = np.clip(rng.normal([[20 * label], [128], [255 - 20 * label]], 8, (3, 1024)), 0, 255)
            records += bytes([label]) + planes.astype(np.uint8).tobytes()
        (folder / name).write_bytes(records)
    return folder


def invoke(*words: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_images_are_the_records_of_the_files(data: Path) -> None:
    images, labels = read_images(data)
    assert images.shape == (15, 32, 32, 3)
    record = (data / "data_batch_2.bin").read_bytes()[3073:6146]  # the fifth of all
    assert labels[4] == record[0]
    for row, column, color in ((0, 0, 0), (31, 2, 1), (7, 30, 2)):
        assert images[4, row, column, color] == record[1 + 1024 * color + 32 * row + column]
    assert len(read_images(data, test=True)[0]) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data_batch_3.bin cannot be read .*cifar-10-batches-bin"),
        (bytes(3000), "3000 bytes, not records of 3073; it is cut off"),
        (b"\x0b" + bytes(3072), "a label of 11; CIFAR-10's are 0 to 9"),
    ],
)
def test_other_files_are_refused_by_name(content: bytes | None, message: str, data: Path, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((data / name).read_bytes())
    (tmp_path / FILES[2]).unlink()
    if content is not None:
        (tmp_path / FILES[2]).write_bytes(content)
    with pytest.raises(ImageError, match=message):
        read_images(tmp_path)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 0.01), (torch.float16, 0.25), (torch.bfloat16, 1.0)])
def test_pixels_survive_their_autoencoder(dtype: torch.dtype, steps: float) -> None:
    vae = identity_autoencoder(32, shift=-0.1, scale=2.0)
    pixels = 2 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    pixels[0] = 1.0  # a flat image, whose own variance is none
    with torch.no_grad():
        latents = encode_images(vae, pixels)
        torch.testing.assert_close(latents, 2 * (pixels + 0.1), atol=1e-4, rtol=0)
        back = decode_latents(identity_autoencoder(32, -0.1, 2.0).to(dtype=dtype), latents).float()
    assert 127.5 * (back - pixels).abs().max() < steps  # in steps of an 8-bit image


def test_the_whole_path_runs_on_its_files(data: Path, clip_folder: Path, tmp_path: Path) -> None:
    teacher, out, made, real = (tmp_path / name for name in ("teacher", "run", "made", "real"))
    small = [f"--set={setting}" for setting in ("images=8", "batch=4", "layers=1", "heads=1")]
    invoke("cifar10", "teacher", data, "--out", teacher, "--device", "cpu", *small)
    assert SD3Folder.read(teacher).latent_shape == (3, 32, 32)
    assert (teacher / "prompts.txt").read_text() == "image\n"

    settings = {"teacher": teacher, "prompts.source": teacher / "prompts.txt", "images": 8, "batch": 4}
    settings |= {"evaluation.images": 2, "evaluation.teacher_steps": 2}
    invoke("run", "cifar10", "--out", out, *(f"--set={key}={value}" for key, value in settings.items()))
    with Image.open(next((out / "samples").iterdir())) as grid:
        assert grid.height > 2 * 128  # one prompt, but a grid full of seeds
    image = stock_pipeline(out / "student").to(torch.float32)(
        "image", num_inference_steps=1, guidance_scale=0, max_sequence_length=0
    )
    assert image.images[0].size == (32, 32)

    prompts = ["--file", teacher / "prompts.txt", "--count", 3, "--device", "cpu"]
    invoke("generate", *prompts, "--student", out / "student", "--out", made)
    invoke("generate", *prompts, "--teacher", teacher, "--steps", 2, "--out", tmp_path / "slow")
    invoke("cifar10", "images", data, "--out", real, "--test")
    scores = ["--clip", clip_folder, "--reference", real, "--device", "cpu", "--json"]
    for folder in (made, tmp_path / "slow"):
        assert json.loads(invoke("score", folder, *scores))["cmmd"] > 0


def test_other_images_and_models_are_not_replaced(data: Path, teacher: Path, tmp_path: Path) -> None:
    list(write_images(data, tmp_path, False, True))
    assert list(write_images(data, tmp_path, False, True)) == [1, 2, 3]  # the same command again
    with pytest.raises(OutputError, match="lists other images"):
        list(write_images(data, tmp_path, True, True))
    (tmp_path / "metadata.jsonl").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "00001.png")
    with pytest.raises(OutputError, match=r"00001\.png exists"):
        list(write_images(data, tmp_path, False, True))
    with pytest.raises(OutputError, match="but no state of this training"):
        check_teacher_folder(teacher)
    (tmp_path / "prompts.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds prompts\.txt"):
        check_teacher_folder(tmp_path)


def test_a_conditional_teacher_and_real_images_know_the_classes(data: Path, tmp_path: Path) -> None:
    recipe = Cifar10Recipe(images=4, batch=4, conditional=True, layers=1, heads=1, seed=1)
    list(train_teacher(data, recipe, tmp_path / "teacher", CPU))
    assert (tmp_path / "teacher" / "prompts.txt").read_text().split() == list(CLASSES)

    images, labels = read_images(data, test=True)
    invoke("cifar10", "images", data, "--out", tmp_path / "real", "--test", "--conditional")
    examples = list(read_examples(str(tmp_path / "real")))
    assert [example.caption for example in examples] == [CLASSES[label] for label in labels]
    list(encode_examples(SD3Folder.read(tmp_path / "teacher"), examples, tmp_path / "cache"))
    spec = SD3Folder.read(tmp_path / "teacher")
    expected = (to_pixels(images) - spec.shift_factor) * spec.scaling_factor
    found = ImageCache(tmp_path / "cache", SD3Folder.read(tmp_path / "teacher")).rows(torch.arange(3)).x_0
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # the folder's weights are fp16
