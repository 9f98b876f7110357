"""`OneStepPipeline`: shapes, seeds, truncated prompts, and records that it refuses."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from tiny import CLIP_LENGTH, PROMPTS, undistilled

from distill.errors import TeacherError
from distill.pipeline import SHIPPED_STUDENT, OneStepPipeline, RuntimeOptions, read_student


@pytest.fixture(scope="module")
def student(teacher_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undistilled(teacher_t5, tmp_path_factory.mktemp("students") / "t5", "tiny-t5-one-step")


@pytest.mark.parametrize("count", [1, 4, 5])
def test_images_are_uint8_one_for_each_prompt_and_seed(count: int, student: Path) -> None:
    images = OneStepPipeline.load(student)(PROMPTS[:1] * count, range(count))
    assert (images.shape, images.dtype) == ((count, 16, 16, 3), torch.uint8)
    assert len({image.numpy().tobytes() for image in images}) == count


def test_seeds_that_differ_in_their_high_bits_alone_give_other_images(student: Path) -> None:
    images = OneStepPipeline.load(student)(PROMPTS[:1] * 2, [7, 7 + 2**32])
    assert not torch.equal(images[0], images[1])


def test_a_pipeline_s_memory_is_free_as_soon_as_nothing_refers_to_it(student: Path) -> None:
    """A published student takes tens of gigabytes, and the garbage collector does not know of a GPU's memory."""
    pipeline = OneStepPipeline.load(student)
    pipeline(PROMPTS[:1], [0])
    parts = [weakref.ref(part) for part in (pipeline._transformer, pipeline._vae, pipeline._text.t5)]
    gc.disable()
    try:
        del pipeline
        assert [part() for part in parts] == [None, None, None]
    finally:
        gc.enable()


def test_several_batch_buckets_keep_their_tolerance_in_any_batch() -> None:
    prompts, seeds = ["a red circle left of a blue star", "a green triangle"] * 8, range(16)
    strict = OneStepPipeline.load(SHIPPED_STUDENT)
    fast = OneStepPipeline.load(SHIPPED_STUDENT, options=RuntimeOptions(batch_buckets=(1, 2, 8)))
    cond = strict.encode(prompts)
    latents = strict.latents(cond, strict.noise(seeds))
    images = strict.decode(latents).int()
    for together in (1, 2, 8):
        parts = [slice(start, start + together) for start in range(0, 16, together)]
        conds = [fast.encode(prompts[part]) for part in parts]
        made = torch.cat([fast.latents(cond, fast.noise(seeds[part])) for cond, part in zip(conds, parts, strict=True)])
        assert (made - latents).abs().max() <= 1e-4
        off = (fast.decode(made).int() - images).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() < 1e-3


def test_a_truncated_prompt_is_reported(student: Path) -> None:
    pipeline = OneStepPipeline.load(student)
    assert pipeline.spec.token_limit == CLIP_LENGTH
    assert pipeline.truncated(["a", "a " * CLIP_LENGTH]) == [False, True]
    assert pipeline.count_tokens(["a red circle", "a " * CLIP_LENGTH]) == [5, CLIP_LENGTH]


def test_each_condition_needs_a_seed(student: Path) -> None:
    with pytest.raises(ValueError, match="2 conditions need the noise of as many seeds, not of 1"):
        OneStepPipeline.load(student)(["a", "red"], [0])


@pytest.mark.parametrize("record", [True, False])
def test_a_teacher_is_told_from_a_student_with_and_without_a_record(
    record: bool, teacher: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    if not record:
        (copy / "onestep.json").unlink()
    with pytest.raises(TeacherError, match="is a teacher, not a one-step student; distill it"):
        read_student(copy)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"start_time": 0.9}, "another format"), ({"format": 2}, "another format"), ({"sizes": "big"}, "garbles")],
)
def test_a_record_that_this_version_cannot_serve_is_refused(
    change: dict[str, object], sentence: str, student: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(student, tmp_path / "copy")
    record = json.loads((copy / "onestep.json").read_text())
    (copy / "onestep.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(TeacherError, match=sentence):
        read_student(copy)
