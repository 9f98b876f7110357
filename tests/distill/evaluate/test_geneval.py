"""Images of GenEval's prompts: folders are complete, calls are resumed, and models are not mixed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import ConfigError, OutputError, PromptError, RunError
from distill.evaluate.geneval import generate_geneval_images, read_geneval_prompts
from distill.evaluate.image_folder import find_images

LINES = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "two clocks – «naïve»"}',
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8-sig")  # as some editors save it
    return path


def invoke(*words: str | Path):
    return CliRunner().invoke(app, [*map(str, words), "--device", "cpu"], catch_exceptions=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_teacher_fills_the_folders_and_more_images_leave_the_first_alone(teacher, prompts, tmp_path) -> None:
    out = tmp_path / "out"
    command = ("geneval", prompts, "--teacher", teacher, "--out", out, "--steps", "2", "--batch", "3")
    assert invoke(*command, "--images", "1").exit_code == 0
    first = contents(out)
    assert first.keys() == {
        "images.json", *(f"0000{i}/{name}" for i in range(2) for name in ("metadata.jsonl", "samples/0000.png")),
    }  # fmt: skip
    assert [first[f"0000{i}/metadata.jsonl"].decode() for i in range(2)] == [line + "\n" for line in LINES]
    (out / "00001/samples/0000.png").unlink()  # as if stopped before it
    assert invoke(*command, "--images", "2").exit_code == 0
    both = contents(out)
    assert both.keys() - first.keys() == {"00000/samples/0001.png", "00001/samples/0001.png"}
    assert {name: both[name] for name in first} == first
    assert len({both[name] for name in both if name.endswith(".png")}) == 4  # every seed is another
    with Image.open(out / "00001/samples/0001.png") as image:
        assert image.size == (16, 16)
        assert image.info["prompt"] == json.loads(LINES[1])["prompt"]
    with pytest.raises(RunError, match="another guidance"):
        invoke(*command, "--guidance", "2")


def test_images_without_a_record_are_not_mixed_with_those_of_a_model(teacher, prompts, tmp_path) -> None:
    (tmp_path / "out" / "00000" / "samples").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "00000" / "samples" / "0000.png")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match=r"no images\.json"):
        invoke("geneval", prompts, "--teacher", teacher, "--out", tmp_path / "out", "--images", "1")
    assert contents(tmp_path / "out") == before


def test_a_student_renders_too(prompts, tmp_path) -> None:
    from distill.pipeline import SHIPPED_STUDENT

    assert invoke("geneval", prompts, "--student", SHIPPED_STUDENT, "--out", tmp_path / "out", "--images", "1")
    assert len(find_images(tmp_path / "out")) == 2
    with pytest.raises(ConfigError, match="either --student or --teacher"):
        invoke("geneval", prompts, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"), [("", "holds no prompts"), ('{"prompt": "a"}\n{"tag": 1}', "line 2"), ("{", "line 1")]
)
def test_another_file_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(PromptError, match=message):
        read_geneval_prompts(path)
    with pytest.raises(PromptError, match="cannot be read"):
        read_geneval_prompts(tmp_path / "absent.jsonl")


def test_existing_images_are_not_generated_again(prompts, tmp_path) -> None:
    used = []

    def generate(texts, seeds):
        used.extend(seeds)
        return np.zeros((len(texts), 4, 4, 3), np.uint8)

    for images in (1, 3, 3):
        read = read_geneval_prompts(prompts)
        done = list(generate_geneval_images(read, generate, {"model": "m"}, images, 10, 4, tmp_path / "out"))
        assert done[-1] == 2 * images
    assert used == [10, 11, 12, 14, 13, 15]
