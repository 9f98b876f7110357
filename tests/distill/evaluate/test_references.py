"""The teacher's images are made once; missing ones are added, and other settings have other images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from memory import rows_in_memory
from PIL import Image

from distill.errors import ScorerError
from distill.evaluate.references import BATCH, REPEAT_SEEDS, References
from distill.evaluate.sampler import Sampling, TeacherSampler
from distill.methods.policies import TeacherGuidance
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder, TextCondition

PROMPTS = ["a red circle", "a blue square"]
CPU = torch.device("cpu")


def references(folder: Path, teacher: Path, steps: int = 1, guidance: float = 2.0, **changes) -> References:
    given = {"size": (16, 16), "prompts": PROMPTS, "images": 17, **changes}
    return References(folder, SD3Folder.read(teacher), Sampling(steps, TeacherGuidance(scale=guidance)), **given)


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory) -> References:
    found = references(tmp_path_factory.mktemp("references"), teacher)
    progress = [(each.images, each.total) for each in found.make(CPU)]
    total = 17 + 2 * REPEAT_SEEDS
    assert progress == [(0, total), (BATCH, total), (total, total)]
    return found


def contents(found: References) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in found.folder.iterdir()}


def test_images_hold_their_prompt_and_are_those_of_the_sampler(made, teacher) -> None:
    assert made.missing() == []
    record = json.loads((made.folder / "references.json").read_text())
    assert record["prompts"][:3] == [*PROMPTS, PROMPTS[0]]  # too few prompts are repeated
    assert record["teacher"] == made.teacher.digest
    with Image.open(made.folder / "00001.png") as image:
        assert image.info["prompt"] == PROMPTS[1]
        assert image.info["seed"] == "1"
    batch = next(made.batches())
    sampler = TeacherSampler(made.teacher, CPU)
    expected = sampler.generate(made.sampling, made.texts[batch], made.seeds[batch])
    assert np.abs(made.read(batch).astype(int) - expected).max() <= 1  # prompts are encoded one by one


def test_a_stopped_call_continues_and_a_complete_one_does_nothing(made, teacher, tmp_path) -> None:
    stopped = references(tmp_path, teacher)
    steps = stopped.make(CPU)
    assert [next(steps).images, next(steps).images] == [0, BATCH]
    steps.close()
    (stopped.folder / "00003.png").unlink()  # as if killed within the first batch
    assert [batch.start for batch in stopped.missing()] == [0, BATCH]
    loaded = []

    def load() -> TeacherSampler:
        loaded.append(TeacherSampler(stopped.teacher, CPU, stopped.texts, tmp_path))
        return loaded[0]

    assert [each.images for each in stopped.make(CPU, load)][-1] == len(stopped.texts)
    assert contents(stopped) == contents(made)
    assert list(stopped.make(CPU, load)) == []
    assert len(loaded) == 1


def test_other_settings_are_other_images(made, teacher, teacher_t5) -> None:
    folder = made.folder.parent
    assert references(folder, teacher).folder == made.folder
    others = [
        references(folder, teacher, steps=2),
        references(folder, teacher, guidance=3.0),
        references(folder, teacher_t5),
        references(folder, teacher, size=(24, 16)),
        references(folder, teacher, prompts=PROMPTS[:1]),
        references(folder, teacher, images=18),
    ]
    assert len({each.folder for each in (made, *others)}) == 7
    assert all(each.missing() for each in others)


def test_a_damaged_image_is_named(teacher, tmp_path) -> None:
    found = references(tmp_path, teacher, images=2)
    list(found.make(CPU))
    (found.folder / "00001.png").write_bytes(b"")
    with pytest.raises(ScorerError, match=r"00001\.png cannot be decoded .*; replace or remove it"):
        found.read(next(found.batches()))


def test_memory_does_not_grow_with_the_number_of_prompts(teacher, tmp_path) -> None:
    """The encoded prompts are on disk; each is encoded once, alone, and read once, with its batch."""
    prompts = [f"red {number}" for number in range(3 * BATCH)]
    found = references(tmp_path, teacher, prompts=prompts, images=len(prompts))
    encoded: list[tuple[int, int]] = []  # prompts of a call, and all in memory
    shape = found.teacher.text_shape
    before, encode = rows_in_memory(shape), SD3TextEncoder.encode

    def watched(self: SD3TextEncoder, texts: list[str]) -> TextCondition:
        encoded.append((len(texts), rows_in_memory(shape) - before if len(encoded) % BATCH == 0 else 0))
        return encode(self, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SD3TextEncoder, "encode", watched)
        sampling = [rows_in_memory(shape) - before for _ in found.make(CPU)]
    assert [count for count, _ in encoded] == [1] * (len(prompts) + 1)  # and the empty prompt
    assert max(held for _, held in encoded) <= 1
    assert max(sampling) <= 1
    assert [path.suffix for path in found.folder.iterdir()].count(".png") == len(found.texts)
    assert len(list(found.folder.iterdir())) == len(found.texts) + 1  # and the record
