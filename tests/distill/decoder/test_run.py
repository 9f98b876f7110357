"""Small decoders from the command to the student folder: training, resumption, export, and what is refused."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cards import run_card
from commands import invoke
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from tiny import PROMPTS, undistilled

from distill.decoder.recipe import DecoderRecipe
from distill.decoder.run import DecoderRun, distill_decoder, resolve
from distill.errors import CheckpointError, ConfigError, OutputError
from distill.evaluate.sampler import Sampling
from distill.flow import noise
from distill.methods.policies import TeacherGuidance
from distill.models.sd3_folder import SD3Folder
from distill.pipeline import OneStepPipeline, RuntimeOptions, read_student
from distill.report.html import render_report
from distill.report.run_folder import read_run
from distill.training.state import TrainingProgress

CPU = torch.device("cpu")
RECIPE = DecoderRecipe(
    images=32, batch=8, latents=12, crop=16, width=8, blocks=(1, 0), evaluation_images=4, log_every=8,
    evaluate_every=16, checkpoint_every=16, warmup=8, ema_half_life=16,
)  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS[:2]))
    return path


@pytest.fixture(scope="module")
def exported(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undistilled(teacher, tmp_path_factory.mktemp("students") / "student")


@pytest.fixture
def student(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "student"))


def plan(student: Path, prompts: Path, out: Path, recipe: DecoderRecipe = RECIPE) -> DecoderRun:
    model = SD3Folder.read(student)
    return DecoderRun(resolve(recipe, model, None, str(prompts), None), model, None, out, (model,))


def train(run: DecoderRun, stop_at: int | None = None) -> None:
    """Train to the end, or stop as Ctrl-C does."""
    with closing(distill_decoder(run, CPU)) as steps:
        for progress in steps:
            if isinstance(progress, TrainingProgress) and progress.images == stop_at:
                progress.save()
                return


def test_the_command_trains_a_decoder_that_the_student_and_stock_diffusers_use_alike(
    teacher: Path, student: Path, prompts: Path, tmp_path: Path
) -> None:
    before, out = read_student(student), tmp_path / "run"
    settings = RECIPE.model_dump(exclude={"images", "weights", "feature_share"}, exclude_unset=True)
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    done = invoke(
        "decoder", str(student), "--images", "32", "--prompts", "-", "--default", "small",
        "--out", str(out), "--device", "cpu", *words, input=prompts.read_text(),
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    assert f"It was added to {student}" in done.output

    # The record names the decoder; the digest of the student stays, and the fingerprint tells the two apart.
    after = read_student(student)
    assert (before.decoder, before.small_decoder, after.decoder) == ("full", None, "small")
    assert after.digest == before.digest
    small = OneStepPipeline.load(student)
    full = OneStepPipeline.load(student, options=RuntimeOptions(decoder="full"))
    assert (small.decoder, full.decoder) == ("small", "full")
    assert small.fingerprint != full.fingerprint
    assert after.small_decoder is not None
    assert after.small_decoder[:16] in small.fingerprint

    # Stock diffusers, by the lines of the card.
    (named,) = run_card(student / "decoder")
    stock: Any = named["pipeline"]
    assert isinstance(stock.vae, AutoencoderTiny)
    stock.set_progress_bar_config(disable=True)
    images = stock(
        PROMPTS,
        num_inference_steps=1,
        guidance_scale=0,
        latents=noise(range(4), (4, 8, 8)),
        height=16,
        width=16,
        max_sequence_length=0,
        output_type="np",
    ).images
    made = np.asarray(small(PROMPTS, range(4))).astype(int)
    assert np.abs(made - np.round(255 * images)).max() <= 1
    assert np.abs(made - np.asarray(full(PROMPTS, range(4))).astype(int)).max() > 1

    # Another export of the student keeps it.
    undistilled(teacher, student, images_seen=8)
    assert (read_student(student).images_seen, read_student(student).small_decoder) == (8, after.small_decoder)
    assert OneStepPipeline.load(student).decoder == "small"

    # The run folder is one that `distill runs` and `distill report` read.
    run = read_run(out)
    assert (run.state, run.images) == ("finished", 32)
    assert [line["images"] for line in run.evaluations] == [16, 32]
    assert {"psnr", "ssim", "sharpness", "color_shift", "time_ratio"} <= run.best.keys()
    assert "Small decoder of tiny" in render_report(run)
    with Image.open(out / "samples" / "000000000032.png") as grid:
        assert grid.width > 0


def test_a_resumed_training_gives_the_same_bits(student: Path, prompts: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(plan(student, prompts, whole))
    train(plan(student, prompts, parts), stop_at=24)
    assert read_run(parts).state == "stopped"
    train(plan(student, prompts, parts))
    found, expected = (load_file(out / "decoder" / WEIGHTS) for out in (parts, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # A finished training is not repeated, and its decoder can be added to a student again, with the same metrics.
    shutil.rmtree(student / "decoder")
    evaluations = (parts / "evaluations.jsonl").read_text()
    train(plan(student, prompts, parts))
    assert (parts / "evaluations.jsonl").read_text() == evaluations
    # A process that was killed between the last checkpoint and its evaluation evaluates at the next start.
    (parts / "evaluations.jsonl").unlink()
    train(plan(student, prompts, parts))
    (line,) = read_run(parts).evaluations
    assert line["images"] == 32
    assert line["psnr"] == json.loads(evaluations.splitlines()[-1])["psnr"]
    assert (student / "decoder" / WEIGHTS).read_bytes() == (whole / "decoder" / WEIGHTS).read_bytes()


def test_training_comes_nearer_to_the_vae(student: Path, prompts: Path, tmp_path: Path) -> None:
    changes = {"images": 480, "width": 16, "blocks": (2, 1), "log_every": 80, "evaluate_every": 480}
    train(plan(student, prompts, tmp_path / "run", RECIPE.model_copy(update=changes)))
    psnr = [line["psnr"] for line in read_run(tmp_path / "run").metrics]
    assert psnr[-1] > psnr[0] + 1


def test_a_teacher_in_few_steps_and_real_images_are_sources_too(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 16), (80 * i, 0, 90)).save(folder / f"{i}.png")  # without captions
    model, sampling = SD3Folder.read(teacher), Sampling(2, TeacherGuidance(scale=2.0))
    recipe = RECIPE.model_copy(update={"images": 8})
    config = resolve(recipe, model, sampling, str(prompts), str(folder))
    train(DecoderRun(config, model, sampling, tmp_path / "run"))
    caches = [
        json.loads((tmp_path / "run" / name / "latents.json").read_text()) for name in ("latents", "real-latents")
    ]
    assert [cache["images"] for cache in caches] == [12, 3]
    assert (tmp_path / "run" / "decoder" / WEIGHTS).exists()


def test_a_budget_in_seconds_becomes_images(student: Path, prompts: Path, tmp_path: Path) -> None:
    run = plan(student, prompts, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "speed.json").write_text('{"images_per_second": 16.0}')
    with pytest.raises(OutputError, match=r"speed.json, but no config.yaml"):
        list(distill_decoder(run, CPU, 1.5))
    (tmp_path / "run" / "config.yaml").write_text("kind: decoder")
    list(distill_decoder(run, CPU, 1.5))
    assert read_run(tmp_path / "run").images == 24


def test_nothing_of_another_program_is_replaced(student: Path, prompts: Path, tmp_path: Path) -> None:
    run = plan(student, prompts, tmp_path / "run")
    other = student / "decoder" / "config.json"
    other.parent.mkdir()
    other.write_text("{}")
    with pytest.raises(OutputError, match=r"not the decoder that onestep.json names"):
        train(run)
    other.rename(other.with_name("notes.txt"))
    with pytest.raises(OutputError, match=r"notes.txt is not a part of a small decoder"):
        train(run)
    assert not (tmp_path / "run").exists()
    shutil.rmtree(other.parent)
    for inside in (student, student / "vae" / "run"):
        with pytest.raises(OutputError, match="is inside the model"):
            train(plan(student, prompts, inside))
    assert not (student / "config.yaml").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("teacher: scenes\nimages: 5\n")
    with pytest.raises(OutputError, match="another run than that of a decoder"):
        train(run)


def test_another_recipe_blocks_or_unknown_prompts_are_refused(student: Path, prompts: Path, tmp_path: Path) -> None:
    train(plan(student, prompts, tmp_path / "run"), stop_at=8)
    with pytest.raises(CheckpointError, match="was trained with width = 8, not 16"):
        train(plan(student, prompts, tmp_path / "run", RECIPE.model_copy(update={"width": 16})))
    with pytest.raises(ConfigError, match="blocks names 3 resolutions, and a decoder by a factor of 2 has 2"):
        train(plan(student, prompts, tmp_path / "new", RECIPE.model_copy(update={"blocks": (1, 1, 1)})))
    with pytest.raises(ConfigError, match="give --prompts FILE"):
        resolve(RECIPE, SD3Folder.read(student), None, None, None)


def test_a_decoder_that_the_record_does_not_name_is_refused(student: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no small decoder"):
        OneStepPipeline.load(student, options=RuntimeOptions(decoder="small"))
    train(plan(student, prompts, tmp_path / "run", RECIPE.model_copy(update={"images": 8})))
    config = student / "decoder" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    with pytest.raises(ConfigError, match=r"is damaged or not the one that onestep.json names"):
        OneStepPipeline.load(student, options=RuntimeOptions(decoder="small"))
    (student / "decoder" / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=r"is damaged or not the one that onestep.json names"):
        OneStepPipeline.load(student, options=RuntimeOptions(decoder="small"))
    assert OneStepPipeline.load(student).decoder == "full"
