"""The estimate of what a run needs."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from distill.config import Cadence, EvaluationSettings, RealImages, load_config
from distill.data.embedding_cache import text_dtype
from distill.errors import OutputError
from distill.models.geometry import read_geometry
from distill.models.sd3_folder import SD3Folder
from distill.plan.options import run_input, teacher_config
from distill.plan.run_estimate import estimate_plan, estimate_run
from distill.training.evaluation import GRID
from distill.training.run_evaluator import evaluated_images
from distill.training.run_sources import RunImages, RunPrompts
from distill.worlds.scenes.eval_dataset import ScenesEvalDataset

CPU = torch.device("cpu")


def estimated(teacher, tmp_path, *overrides, reals=None):
    (tmp_path / "prompts.txt").write_text("a\nred\nred\nblue\n")
    words = [f"teacher={teacher}", f"prompts.source={tmp_path / 'prompts.txt'}", "prompts.max_sequence_length=9"]
    config, out = load_config("scenes-debug", [*words, *overrides]), tmp_path / "run"
    folder = SD3Folder.read(teacher).with_sequence_length(9)
    return estimate_run(config, out, folder, RunPrompts(config.prompts, out), CPU, reals=reals)


def test_a_million_prompts_of_sd3_are_encoded_online():
    geometry = read_geometry("sd3-medium")
    made, few = (run_input(geometry, teacher_config(geometry, given)) for given in ([], ["prompts.max_count=393"]))
    assert made.prompt_bytes == (77 + 256) * 4096 * 2 + 2048 * 2  # 2.73 MB
    assert made.online
    assert not few.online


def test_encoding_disk_and_time_are_stated(teacher_t5, tmp_path):
    cached, online = (estimated(teacher_t5, tmp_path, f"prompts.encoding={way}") for way in ("auto", "online"))
    row = ((8 + 9) * 48 + 40) * text_dtype(CPU).itemsize
    assert (cached.prompts, cached.prompt_bytes) == (3, row)
    assert (cached.cache, online.cache) == (3 * row, 0)
    assert cached.disk - online.disk == 3 * row
    assert "3 distinct" in cached.lines()[0]
    assert "encoding" in cached.lines()[2]
    assert "online" in online.lines()[0]
    assert 0 < online.encoding_share < 1
    assert min(cached.encoding_seconds, cached.training_seconds, online.training_seconds) > 0


def test_real_images_need_room_and_time_for_their_latents_and_captions(teacher_t5, tmp_path):
    """Those of Stable Diffusion 3 take 3.8 MB each, 100 000 of them 380 GB."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red circle")
    sources = RealImages(source=str(folder)), RealImages(source="scenes", max_count=5)
    needs = [estimated(teacher_t5, tmp_path, reals=RunImages(source, tmp_path / "run")) for source in sources]
    row = ((8 + 9) * 48 + 40) * text_dtype(CPU).itemsize + 4 * 4 * 8 * 8
    assert [need.image_cache for need in needs] == [3 * row, 5 * row]
    assert needs[1].disk - needs[0].disk == 2 * row
    assert "real images" in needs[0].lines()[1]
    assert [need.real_images for need in needs] == [3, 5]
    three, five = (need.encoding_seconds / need.training_seconds for need in needs)  # at any measured speed
    none = estimated(teacher_t5, tmp_path)
    prompts = none.encoding_seconds / none.training_seconds
    assert five - prompts == pytest.approx((three - prompts) * 5 / 3)
    assert three > 2 * prompts  # an image and its caption take more than a prompt


def test_a_run_that_keeps_the_teachers_images_needs_room_for_them(teacher_t5, tmp_path):
    words = ("evaluation.evaluator=reference", "evaluation.images=32")
    own, shared = (estimated(teacher_t5, tmp_path, *words, *more) for more in ((), ("evaluation.references=shared",)))
    assert own.disk - shared.disk == own.references == (32 + 2 * 4) * 3 * 16 * 16
    assert "the teacher's images" in own.lines()[1]
    assert "the teacher's images" not in shared.lines()[1]


def test_a_run_needs_room_for_the_encoded_prompts_of_its_evaluations(teacher_t5, tmp_path):
    words = ("evaluation.evaluator=clip", "evaluation.clip=folder")
    few, more = (estimated(teacher_t5, tmp_path, *words, f"evaluation.images={count}") for count in (32, 64))
    assert more.disk - few.disk == more.known_prompts - few.known_prompts == 32 * few.prompt_bytes
    assert few.known_prompts == (GRID + 32) * few.prompt_bytes
    assert "prompts of evaluations" in few.lines()[1]


def test_the_time_of_every_evaluator_is_stated(teacher_t5, tmp_path):
    """The evaluator `clip` needs no images of the teacher; half as many images take half the time."""
    words = ("evaluation.evaluator=clip", "evaluation.clip=folder")
    clip, half = (estimated(teacher_t5, tmp_path, *words, f"evaluation.images={count}") for count in (64, 32))
    shares = [each.evaluation_seconds / each.training_seconds for each in (clip, half)]  # at any measured speed
    assert shares[0] == pytest.approx(2 * shares[1])
    assert half.evaluation_seconds > 0
    assert clip.reference_seconds == clip.references == 0
    assert "evaluations" in clip.lines()[2]
    assert estimated(teacher_t5, tmp_path, "evaluation.evaluator=none").evaluation_seconds == 0
    config = load_config("scenes-debug")
    assert evaluated_images(config, "scenes") == ScenesEvalDataset().prompts(16, 0).count
    assert evaluated_images(config, "reference") == 16 + 4


def test_a_plan_counts_the_evaluations_and_the_real_images_of_its_run(teacher):
    """Each evaluator has its own number of images; a run is also evaluated at its end."""
    geometry = read_geometry(str(teacher))
    config = teacher_config(geometry, ["method=reflow", "precision=fp32", "prompts.max_count=8", "images=35"])
    made = run_input(geometry, config)
    plan = made.plan()

    def planned(cadence=10, **settings):
        changes = {"evaluation": EvaluationSettings(images=32, **settings), "cadence": Cadence(evaluate=cadence)}
        return estimate_plan(config.model_copy(update=changes), made, plan, 1e12)

    reference, clip = planned(), planned(evaluator="clip", clip="folder")
    none, once = planned(evaluator="none"), planned(cadence=35)
    assert reference.evaluation_seconds == pytest.approx(4 * once.evaluation_seconds)
    assert 0 < clip.evaluation_seconds < reference.evaluation_seconds
    assert (none.evaluation_seconds, none.reference_seconds, none.references) == (0, 0, 0)
    assert (clip.reference_seconds, clip.references) == (0, 0)
    assert reference.references == (32 + 2 * 4) * 3 * 16 * 16

    real = [config.model_copy(update={"real": RealImages(source="scenes", max_count=n)}) for n in (1, 3)]
    one, three = (estimate_plan(each, made, plan, 1e12).encoding_seconds for each in real)
    assert three - reference.encoding_seconds == pytest.approx(3 * (one - reference.encoding_seconds))
    assert one > reference.encoding_seconds


def test_the_time_of_a_small_model_is_stated_as_less_than_it_takes(teacher_t5, tmp_path):
    small = estimated(teacher_t5, tmp_path)
    assert "takes longer" in small.lines()[2]
    assert "takes longer" not in replace(small, image_flop=1e14).lines()[2]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(teacher_t5, tmp_path, monkeypatch):
    found = estimated(teacher_t5, tmp_path)
    found.check_disk(tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=found.disk - 1))
    with pytest.raises(OutputError, match=r"No space left for .*run: it needs .*, and its disk has .*; free some"):
        found.check_disk(tmp_path / "run")
    for name in ("student", "samples", "checkpoints"):  # only the last one is continued by a resumed run
        (tmp_path / "run" / name).mkdir(parents=True)
        with pytest.raises(OutputError):
            found.check_disk(tmp_path / "run")
        (tmp_path / "run" / name / "file").write_bytes(b"1")
    found.check_disk(tmp_path / "run")


def test_a_complete_cache_in_a_run_folder_makes_no_room_for_what_is_still_to_be_written(
    teacher_t5, tmp_path, monkeypatch
):
    found = replace(estimated(teacher_t5, tmp_path), cache=0)
    cache = tmp_path / "run" / "embeddings"
    cache.mkdir(parents=True)
    (cache / "shard-00000.safetensors").write_bytes(bytes(found.disk))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=found.disk - 1))
    with pytest.raises(OutputError, match="No space left"):
        found.check_disk(tmp_path / "run")
