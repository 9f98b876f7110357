"""A run of any teacher is evaluated and keeps its best student by the metric that decides."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import invoke
from memory import rows_in_memory
from safetensors.torch import load_file, save_file
from tiny import PROMPTS

from distill.config import load_config
from distill.errors import ConfigError, PromptError, ScorerError
from distill.evaluate.references import ReferenceProgress
from distill.report.run_folder import read_run
from distill.report.run_state import read_state
from distill.run import Activity, accelerator, run
from distill.training import checkpoint
from distill.training.preparation import check_run
from distill.training.run_evaluator import check_evaluator, evaluator_kind, run_evaluator, run_references
from distill.training.run_teacher import read_teacher
from distill.training.trainer import Progress


@pytest.fixture(scope="module")
def settings(teacher, tmp_path_factory) -> list[str]:
    """A short run of the tiny teacher that learns so fast that its students differ."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]))
    return [
        f"teacher={teacher}", f"prompts.source={prompts}", "images=24", "batch=8", "optimizer.warmup_images=0",
        "optimizer.student_lr=0.01", "ema_half_life=0", "cadence.evaluate=8", "cadence.checkpoint=8",
        "cadence.keep_checkpoints=3", "trackers=[]", "evaluation.images=8", "evaluation.teacher_steps=2",
    ]  # fmt: skip


def distill(out: Path, settings: list[str], *more: str) -> list[object]:
    config = load_config("scenes-debug", [*settings, *more])
    return list(run(config, out, accelerator(config, out)))


@pytest.fixture(scope="module")
def whole(settings, clip_folder, tmp_path_factory) -> tuple[Path, list[object]]:
    """An uninterrupted run, and its progress."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, distill(out, settings, f"evaluation.clip={clip_folder}")


def test_the_best_student_by_the_metric_is_kept_and_exported(whole) -> None:
    out, progress = whole
    found = read_run(out)
    assert [line["images"] for line in found.evaluations] == [8, 16, 24]
    assert {"kernel", "frechet", "relative_diversity", "grid", "saturation", "clip_score"} < found.evaluations[0].keys()
    assert found.best["kernel"] == min(line["kernel"] for line in found.evaluations)
    assert json.loads((out / "student" / "onestep.json").read_text())["images_seen"] == found.best["images"]
    assert len(list((out / "evaluations").glob("*.png"))) == 3
    assert sum(isinstance(each, ReferenceProgress) for each in progress) == 2
    assert len(list((out / "references").glob("*/*.png"))) == 8 + 4


def test_an_evaluation_does_not_change_what_a_student_learns(whole, settings, tmp_path) -> None:
    out, _ = whole
    distill(tmp_path, settings, "evaluation.evaluator=none")
    newest = Path("checkpoints") / checkpoint.state_name(24) / "state.safetensors"
    evaluated, alone = load_file(out / newest), load_file(tmp_path / newest)
    assert all(torch.equal(evaluated[name], tensor) for name, tensor in alone.items())
    assert not (tmp_path / "references").exists()
    assert read_run(tmp_path).evaluations == []


def test_without_an_evaluator_a_resumed_run_exports_its_last_student(whole, settings, tmp_path) -> None:
    out = shutil.copytree(whole[0], tmp_path / "run")
    distill(out, settings, "images=32", "evaluation.evaluator=none")
    assert read_run(out).best["images"] < 32
    assert json.loads((out / "student" / "onestep.json").read_text())["images_seen"] == 32


def test_a_resumed_run_reuses_its_references_and_ends_alike(whole, settings, clip_folder, tmp_path) -> None:
    undisturbed, _ = whole
    out = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "checkpoints" / checkpoint.state_name(24))
    progress = distill(out, settings, f"evaluation.clip={clip_folder}")
    assert not any(isinstance(each, ReferenceProgress) for each in progress)
    assert (out / "evaluations.jsonl").read_text() == (undisturbed / "evaluations.jsonl").read_text()
    assert read_run(out).best["images"] == read_run(undisturbed).best["images"]


def test_an_evaluation_that_was_killed_after_its_checkpoint_is_made_again(whole, settings, clip_folder, tmp_path):
    undisturbed, _ = whole
    out = shutil.copytree(undisturbed, tmp_path / "run")
    evaluations = (out / "evaluations.jsonl").read_text()
    pictures = [Path(folder) / f"{24:012d}.png" for folder in ("samples", "evaluations")]
    for path in pictures:
        (out / path).unlink()
    for name in ("student", f"best/{24:012d}"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "evaluations.jsonl").write_text("".join(evaluations.splitlines(keepends=True)[:-1]))
    distill(out, settings, f"evaluation.clip={clip_folder}")
    assert (out / "evaluations.jsonl").read_text() == evaluations
    assert read_run(out).best == read_run(undisturbed).best
    assert all((out / path).read_bytes() == (undisturbed / path).read_bytes() for path in pictures)


def test_a_run_holds_no_encoded_prompt_of_its_evaluations(settings, clip_folder, tmp_path) -> None:
    """Training holds the conditions of two update phases of 8 images each, and the null condition."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"red {number}" for number in range(40)))
    words = ["evaluation.evaluator=clip", f"evaluation.clip={clip_folder}", "evaluation.images=40", "images=8"]
    config = load_config("scenes-debug", [*settings, f"evaluation.prompts={prompts}", *words])
    teacher = read_teacher(config, tmp_path)
    before = rows_in_memory(teacher.text_shape)
    steps = run(config, tmp_path / "run", accelerator(config, tmp_path / "run"), teacher=teacher)
    held = [rows_in_memory(teacher.text_shape) - before for each in steps if isinstance(each, Activity | Progress)]
    assert len(held) >= 2
    assert max(held) <= 2 * 8 + 4


def test_another_metric_chooses_the_best_student_anew(whole, settings, clip_folder, tmp_path) -> None:
    """Its values are not comparable with those of the best student so far. A higher CLIP score is better.

    The run has lost its last checkpoints, so the best student so far has more images than those that are evaluated.
    """
    undisturbed, _ = whole
    out = shutil.copytree(undisturbed, tmp_path / "run")
    for images in (16, 24):
        shutil.rmtree(out / "checkpoints" / checkpoint.state_name(images))
    next((out / "best").iterdir()).rename(out / "best" / checkpoint.state_name(40))
    changed = (f"evaluation.clip={clip_folder}", "evaluation.metric=clip_score", "evaluation.teacher_steps=1")
    progress = distill(out, settings, "images=32", *changed)
    assert any(isinstance(each, ReferenceProgress) for each in progress)
    assert len(list((out / "references").iterdir())) == 2
    found = read_run(out)
    assert [line["images"] for line in found.evaluations] == [8, 16, 24, 32]
    assert found.best["clip_score"] == max(line["clip_score"] for line in found.evaluations)
    assert [path.name for path in (out / "best").iterdir()] == [checkpoint.state_name(int(found.best["images"]))]
    assert (out / "evaluations-1.jsonl").read_text() == (undisturbed / "evaluations.jsonl").read_text()


def test_a_run_that_stops_while_the_teacher_is_sampled_goes_on(settings, tmp_path) -> None:
    config = load_config("scenes-debug", [*settings, "evaluation.images=20"])
    steps = run(config, tmp_path, accelerator(config, tmp_path))
    while not (isinstance(each := next(steps), ReferenceProgress) and each.images):
        pass
    assert read_state(tmp_path).phase == "sampling"
    steps.close()
    assert read_state(tmp_path).phase == "interrupted"
    resumed = run(config, tmp_path, accelerator(config, tmp_path))
    first = next(each for each in resumed if isinstance(each, ReferenceProgress))
    resumed.close()
    assert (first.images, first.total) == (16, 20 + 2 * 4)


def test_a_student_is_evaluated_with_the_images_of_its_run(whole, teacher, settings, clip_folder, tmp_path) -> None:
    """Its prompts are given as a stream, which is read once and from its beginning."""
    out, _ = whole
    prompts = Path(settings[1].partition("=")[2]).read_text()
    words = ["--student", str(out / "student"), "--teacher", str(teacher), "--prompts", "-"]
    words += ["--images", "8", "--steps", "2", "--guidance", "2.5", "--references", str(out / "references")]
    words += ["--clip", str(clip_folder), "--teacher-steps", "1", "--picture", str(tmp_path / "worst.png")]
    done = invoke("evaluate", *words, "--device", "cpu", "--json", input=prompts)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    others = ["teacher, 1 step, guidance 2.5", "teacher, 1 step, unguided"]
    assert list(found) == ["features", "teacher", "student", *others]
    assert found["student"].keys() == found["teacher"].keys() == read_run(out).evaluations[0].keys() - {"images"}
    assert found["teacher"]["kernel"] == 0 < found[others[1]]["frechet"]
    assert len(list((out / "references").iterdir())) == 1
    assert (tmp_path / "worst.png").stat().st_size
    refused = invoke("evaluate", "--clip", str(clip_folder), "--picture", str(tmp_path / "worst.png"))
    assert "--clip is given without --prompts" in str(refused.exception)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ([], "scenes"),
        (["evaluation.evaluator=reference"], "reference"),
        (["evaluation.evaluator=none"], "none"),
        (["prompts.source=mine.txt"], "scenes"),  # of the teacher
        (["sizes=[[48,64]]"], "reference"),
    ],
)
def test_the_evaluator_of_the_toy_dataset_is_found(given: list[str], kind: str, tmp_path) -> None:
    config = load_config("scenes-debug", given)
    assert evaluator_kind(config, read_teacher(config, tmp_path)) == kind


def test_a_clip_score_alone_needs_no_images_of_the_teacher(settings, clip_folder, tmp_path) -> None:
    config = load_config("scenes-debug", [*settings, "evaluation.evaluator=clip", f"evaluation.clip={clip_folder}"])
    teacher = read_teacher(config, tmp_path)
    assert run_references(config, teacher, tmp_path, PROMPTS) is None
    evaluator = run_evaluator(config, teacher, tmp_path, PROMPTS[:2], torch.device("cpu"))
    assert evaluator is not None
    assert (evaluator.metric, evaluator.higher_is_better, evaluator.count) == ("clip_score", True, 8)
    assert list(evaluator.prompts) == PROMPTS[:2] * 4


@pytest.mark.parametrize(
    ("given", "warns"),
    [
        (["images=255"], True),
        (["images=256"], False),
        (["images=2", "metric=frechet"], True),
        (["images=2", "metric=clip_score", "clip=CLIP"], False),
        (["images=2", "evaluator=clip", "clip=CLIP"], False),
        (["images=2", "evaluator=none"], False),
    ],
)
def test_too_few_images_for_the_metric_that_decides_give_a_warning(
    given, warns, settings, clip_folder, tmp_path, caplog
) -> None:
    words = [f"evaluation.{each}".replace("CLIP", str(clip_folder)) for each in given]
    config = load_config("scenes-debug", [*settings, *words])
    check_evaluator(config, read_teacher(config, tmp_path))
    assert ("chance decides which checkpoint is the best" in caplog.text) is warns


def test_references_follow_the_run_and_its_file_of_prompts(settings, tmp_path) -> None:
    (tmp_path / "held-out.txt").write_text("red\nblue\nred\nleft\n")
    more = [f"evaluation.prompts={tmp_path / 'held-out.txt'}", "method.guidance.scale=[2,6]", "sizes=[[24,16]]"]
    config = load_config("scenes-debug", [*settings, *more, "evaluation.references=shared"])
    found = run_references(config, read_teacher(config, tmp_path), tmp_path, PROMPTS)
    assert found is not None
    assert found.texts[:4] == ["red", "blue", "left", "red"]
    assert (found.sampling.steps, found.sampling.scale, found.size) == (2, 4.0, (24, 16))
    assert found.folder.parent == Path("shared")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (["evaluation.evaluator=fid"], ConfigError, "there is no 'fid'; there are auto, reference, clip, none, scenes"),
        (["evaluation.evaluator=scenes"], ConfigError, "scenes does not score images of 16x16 pixels; take reference"),
        (["evaluation.prompts=nowhere.txt"], PromptError, "nowhere.txt"),
        (["evaluation.prompts=-"], ConfigError, "evaluation.prompts: - is a stream"),
        (["evaluation.clip=nowhere"], ScorerError, "nowhere is not a CLIP model .* no such folder"),
        ([f"evaluation.references={__file__}"], ConfigError, "evaluation.references: .* is no folder"),
        (["evaluation.evaluator=none", "early_stopping_patience=1"], ConfigError, "early_stopping_patience"),
        (["teacher=scenes", "evaluation.metric=frechet"], ConfigError, "evaluation.metric: the evaluator scenes"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_run(given, error, words, settings, tmp_path) -> None:
    config = load_config("scenes-debug", [*settings, *given])
    with pytest.raises(error, match=words):
        check_run(config, tmp_path / "run", read_teacher(config, tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_clip_model_without_whole_weights_is_refused_before_the_run(settings, clip_folder, tmp_path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / clip_folder.name)
    config = load_config("scenes-debug", [*settings, f"evaluation.clip={folder}"])
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(ScorerError, match="truncated"):
        check_run(config, tmp_path / "run", read_teacher(config, tmp_path))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ScorerError, match=r"no model.safetensors; pytorch_model.bin is not loaded"):
        check_run(config, tmp_path / "run", read_teacher(config, tmp_path))


def test_clip_models_of_one_name_are_told_apart(settings, clip_folder, tmp_path) -> None:
    """Scores of two models do not compare, so the second one chooses the best student anew."""
    folder = shutil.copytree(clip_folder, tmp_path / clip_folder.name)
    tensors = load_file(folder / "model.safetensors")
    tensors["text_projection.weight"] *= -1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    digests = set()
    for evaluator in ("clip", "reference"):
        for each in (clip_folder, folder):
            config = load_config(
                "scenes-debug", [*settings, f"evaluation.evaluator={evaluator}", f"evaluation.clip={each}"]
            )
            teacher = read_teacher(config, tmp_path)
            found = run_evaluator(config, teacher, tmp_path, PROMPTS[:2], torch.device("cpu"))
            assert found is not None
            digests.add(found.digest)
    assert len(digests) == 4


@pytest.mark.parametrize("given", ["evaluator=clip", "metric=clip_score"])
def test_a_clip_score_needs_a_model(given: str) -> None:
    with pytest.raises(ConfigError, match="evaluation: a CLIP score needs a CLIP model"):
        load_config("scenes-debug", [f"evaluation.{given}"])
