"""`distill generate`: files hold prompt and seed, and the same prompt and seed give the same bytes."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import ConfigError, DistillError, OutputError, PromptError
from distill.evaluate.generate import generate_images
from distill.evaluate.sampler import Sampling, TeacherSampler, student_sampler
from distill.files import MARK
from distill.methods.policies import TeacherGuidance
from distill.models.sd3_folder import SD3Folder
from distill.pipeline import SHIPPED_STUDENT, OneStepPipeline

TEXTS = ["a red circle", "a blue square", "ein grüner Kreis – “naïve” 円", "two circles", "a star"]


def generate(*arguments: str | Path):
    return CliRunner().invoke(app, ["generate", *map(str, arguments), "--device", "cpu"], catch_exceptions=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_prompt_becomes_a_file_that_tells_its_prompt_and_seed(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("\n".join(TEXTS[1:]), encoding="utf-8")
    result = generate(TEXTS[0], "--file", tmp_path / "more.txt", "--out", tmp_path / "out", "--seed", 7, "--batch", 2)
    assert result.exit_code == 0
    assert sorted(files(tmp_path / "out")) == [f"0000{i}-{7 + i}.png" for i in range(5)]
    expected = OneStepPipeline.load(SHIPPED_STUDENT)(TEXTS, range(7, 12))
    for i, text in enumerate(TEXTS):
        with Image.open(tmp_path / "out" / f"0000{i}-{7 + i}.png") as image:
            assert (image.info["prompt"], image.info["seed"]) == (text, str(7 + i))
            assert image.tobytes() == expected[i].numpy().tobytes()


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_prompt_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PromptError, match="a prompt is empty"):
        generate("a red circle", text, "--out", tmp_path / "out")


def test_the_same_seed_gives_the_same_bytes_in_any_batch_and_alone(tmp_path: Path) -> None:
    for name, batch in (("one", 1), ("again", 5), ("three", 3)):
        assert generate(*TEXTS, "--out", tmp_path / name, "--seed", 3, "--batch", batch).exit_code == 0
    assert files(tmp_path / "one") == files(tmp_path / "again") == files(tmp_path / "three")
    assert generate(TEXTS[4], "--out", tmp_path / "alone", "--seed", 7).exit_code == 0
    assert files(tmp_path / "alone")["00000-7.png"] == files(tmp_path / "one")["00004-7.png"]
    assert generate(TEXTS[4], "--out", tmp_path / "other", "--seed", 8).exit_code == 0
    assert files(tmp_path / "other")["00000-8.png"] != files(tmp_path / "alone")["00000-7.png"]


def test_a_grid_shows_them_all(tmp_path: Path) -> None:
    result = generate(*TEXTS, "--out", tmp_path / "out", "--batch", 2, "--grid", tmp_path / "grid.png")
    assert result.exit_code == 0
    assert "grid.png" in result.output
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 5 * 128


@pytest.mark.parametrize("place", ["out/00001-1.png", "grid.png"])
def test_pictures_replace_pictures_of_ours_alone(place: str, tmp_path: Path) -> None:
    command = (*TEXTS[:2], "--out", tmp_path / "out", "--grid", tmp_path / "grid.png")
    assert generate(*command).exit_code == 0
    assert generate(*reversed(TEXTS[:2]), *command[2:]).exit_code == 0
    for others in (lambda path: Image.new("RGB", (8, 8)).save(path), lambda path: path.write_text(f"{MARK}\n")):
        others(tmp_path / place)
        before = files(tmp_path / "out"), (tmp_path / place).read_bytes()
        with pytest.raises(OutputError, match=f"{place} exists and was not written by this program"):
            generate(*command)
        assert (files(tmp_path / "out"), (tmp_path / place).read_bytes()) == before


def test_a_file_in_the_place_of_a_folder_and_a_folder_in_that_of_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    words = (("--out", tmp_path / "file"), ("--out", tmp_path / "out", "--grid", tmp_path / "folder"))
    for arguments in words:
        result = generate("a", *arguments)
        assert result.exit_code == 2
        assert "Invalid value for" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_the_image_that_was_there(tmp_path: Path) -> None:
    pipeline = student_sampler(OneStepPipeline.load(SHIPPED_STUDENT))
    list(generate_images(pipeline, ["a red circle"], 0, 1, tmp_path))
    before = files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # bytes: a disk without room
    try:
        with pytest.raises(DistillError, match=r"could not write .*00000-0.png: .*; make room or give another --out"):
            list(generate_images(pipeline, ["a blue square"], 0, 1, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == before


def test_cut_prompts_are_told(tmp_path: Path) -> None:
    result = generate("a red circle", "circle " * 40, "--out", tmp_path)
    assert "1 prompts are longer than the token limit" in result.output


def test_nothing_to_make_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="give prompts or --file"):
        generate("--out", tmp_path)


def test_any_student_folder_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)  # the global generator plays no part
    assert generate(TEXTS[0], "--student", SHIPPED_STUDENT, "--out", tmp_path / "a").exit_code == 0
    torch.manual_seed(1)
    assert generate(TEXTS[0], "--out", tmp_path / "b").exit_code == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_more_steps_than_one_are_refused_for_a_student_of_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one step; set steps to 1, not 4"):
        generate("a red circle", "--steps", 4, "--out", tmp_path)
    assert not files(tmp_path)


def test_prompts_come_round_to_as_many_images_as_asked_for(teacher: Path, tmp_path: Path) -> None:
    words = ["a red circle", "a blue square", "--count", 3, "--out", tmp_path / "out", "--teacher", teacher]
    assert generate(*words, "--steps", 8, "--guidance", 2, "--skip-layers", "0", "--skip-scale", 1.5).exit_code == 0
    pictures = {}
    for path in sorted((tmp_path / "out").iterdir()):
        with Image.open(path) as image:
            pictures[image.info["seed"]] = (image.info["prompt"], np.asarray(image).astype(int))
    assert [pictures[seed][0] for seed in "012"] == ["a red circle", "a blue square", "a red circle"]
    sampler = TeacherSampler(SD3Folder.read(teacher), torch.device("cpu"))
    sampling = Sampling(8, TeacherGuidance(scale=2, skip_layers=(0,), skip_scale=1.5))
    for seed, (prompt, pixels) in pictures.items():
        alone = sampler.generate(sampling, [prompt], [int(seed)])[0]
        assert abs(alone - pixels).max() <= 1  # a teacher rounds differently in a batch
    with pytest.raises(ConfigError, match="are both given; give one of them"):
        generate("a star", "--teacher", teacher, "--student", SHIPPED_STUDENT, "--out", tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--skip-layers", "7"), "--skip-layers: .* 0 to 1"),
        (("--skip-layers", "1", "--guidance", 1), "--guidance above 1"),
    ],
)
def test_blocks_that_cannot_be_skipped_are_refused(options, sentence: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        generate("a star", "--teacher", teacher, *options, "--out", tmp_path)
