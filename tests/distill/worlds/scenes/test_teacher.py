"""Trainings of the toy dataset: a stopped one ends with the bits of an uninterrupted one, and no step waits."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke
from safetensors.torch import load_file
from tiny import make_teacher, stock_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from distill.errors import CacheError, CheckpointError, OutputError, TeacherError
from distill.models.sd3_folder import SD3Folder
from distill.training import checkpoint
from distill.training.state import TrainingProgress
from distill.worlds.denoiser import TrainingData, tokenize, training_step
from distill.worlds.scenes.captions import TASKS, training_prompts, vocabulary
from distill.worlds.scenes.data import CHUNK, make_chunks
from distill.worlds.scenes.latents import SCENES, TOKENS, Scenes, encode_scenes
from distill.worlds.scenes.recipe import ScenesRecipe
from distill.worlds.scenes.teacher import (
    COARSE,
    FINE,
    check_start_folder,
    check_states,
    check_teacher_folder,
    make_denoiser,
    refine,
    train_teacher,
)
from distill.worlds.scenes.vae import VaeRecipe, train_vae
from distill.worlds.tokenizer import build_clip_tokenizer

VAE = VaeRecipe(images=32, seed=1, batch=16, evaluated=8)
RECIPE = ScenesRecipe(
    start=None,
    vae_images=32,
    images=32,
    coarse_images=16,
    scenes=32,
    batch=8,
    learning_rate=1e-3,
    warmup=16,
    decay=8,
    ema_half_life=100,
    per_task=1,
    evaluate_every=16,
    checkpoint_every=1000,
    seed=2,
)
CPU = torch.device("cpu")


def stages(folder: Path) -> Iterator[TrainingProgress]:
    yield from train_vae(VAE, folder, CPU)
    list(encode_scenes(RECIPE, folder, CPU))
    yield from train_teacher(RECIPE, folder, CPU, scales=(2.5,))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    assert [progress.images for progress in stages(folder)] == [16, 32, 8, 16, 24, 32]
    return folder


def denoiser(device: torch.device = CPU) -> tuple[Any, Scenes, torch.Tensor]:
    """An untrained model on small patches, random latents with captions, and the empty caption."""
    torch.manual_seed(0)
    tokenizer = build_clip_tokenizer(vocabulary(), TOKENS)
    ids = tokenize(tokenizer, training_prompts(3 * 64, seed=0)).view(64, 3, TOKENS)
    scenes = Scenes(torch.randn(64, 4, 16, 16).to(device), ids.to(device))
    return make_denoiser(tokenizer, FINE).to(device), scenes, tokenize(tokenizer, [""])[0].to(device)


def test_a_stopped_training_ends_with_the_same_bits(trained: Path, tmp_path: Path) -> None:
    for seen in ([16], [32, 8]):
        progress = list(islice(stages(tmp_path), len(seen)))
        assert [each.images for each in progress] == seen
        progress[-1].save()
    rest = islice(stages(tmp_path), 3)  # what comes after training is a function of its weights
    assert [progress.images for progress in rest] == [16, 24, 32]
    for state in ("vae-state", f"patch-{COARSE}-state", f"patch-{FINE}-state"):
        newest = [checkpoint.latest(folder / state) for folder in (trained, tmp_path)]
        one, other = (checkpoint.load(path)[0] for path in newest if path is not None)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_folder_runs_in_stock_diffusers_as_our_reader_describes_it(trained: Path) -> None:
    spec = SD3Folder.read(trained)
    pipeline = stock_pipeline(trained).to(torch.float32)
    image = pipeline("a red circle", num_inference_steps=2, max_sequence_length=spec.max_sequence_length).images[0]
    assert image.size == (spec.image_size, spec.image_size) == (64, 64)
    assert spec.patch_size == FINE


def test_another_recipe_does_not_continue_a_training_but_another_budget_does(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"learning_rate = 0\.001, not 0\.0001"):
        list(train_teacher(RECIPE.model_copy(update={"learning_rate": 1e-4}), trained, CPU))
    with pytest.raises(CheckpointError, match="trained with vae_images = "):
        check_states(
            RECIPE.model_copy(update={"vae_images": 64}), trained
        )  # another autoencoder would make other latents
    check_states(RECIPE.model_copy(update={"images": 400}), trained)
    more = RECIPE.model_copy(update={"images": 40, "evaluate_every": 8, "checkpoint_every": 8, "per_task": 2})
    assert next(train_teacher(more, shutil.copytree(trained, tmp_path / "copy"), CPU)).images == 40


def test_scenes_are_encoded_once_and_again_for_whatever_changes_them(trained: Path) -> None:
    assert list(encode_scenes(RECIPE, trained, CPU)) == []
    for change in (
        {"seed": 3},
        {"scenes": 31},
        {"task_weights": ScenesRecipe(task_weights={"counting": 1}).task_weights},
    ):
        other = RECIPE.model_copy(update=change)
        with pytest.raises(CacheError, match=SCENES):
            next(train_teacher(other, trained, CPU))
        assert next(encode_scenes(other, trained, CPU)) == other.scenes


def test_scenes_do_not_depend_on_the_number_of_processes() -> None:
    weights = ScenesRecipe(task_weights={"two_object": 3, "counting": 1}).task_weights
    alone, many = (list(make_chunks(7, CHUNK + 5, weights, processes)) for processes in (1, 2))
    assert [len(chunk.images) for chunk in alone] == [CHUNK, 5]
    for one, other in zip(alone, many, strict=True):
        assert one.texts == other.texts
        assert (one.images == other.images).all()


def test_scenes_that_are_not_awaited_end_their_processes() -> None:
    chunks = make_chunks(7, 64 * CHUNK, dict.fromkeys(TASKS, 1 / 6), processes=2)
    next(chunks)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    assert len(children.read_text().split()) >= 2
    before = set(children.read_text().split())
    chunks.close()
    assert len(before & set(children.read_text().split())) <= 1  # multiprocessing's own resource tracker stays


def test_each_sentence_is_tokenized_once() -> None:
    tokenizer = build_clip_tokenizer(vocabulary(), TOKENS)
    seen: list[str] = []

    def counting(texts: list[str], **options: Any) -> Any:
        seen.extend(texts)
        return tokenizer(texts, **options)

    texts = training_prompts(500, seed=0) * 2
    assert torch.equal(tokenize(counting, texts), tokenizer(texts, padding="max_length", return_tensors="pt").input_ids)
    assert sorted(seen) == sorted(set(texts))


class HostReads(TorchDispatchMode):
    """Records operations that make the host wait for a device, send it numbers, or have results of unknown size."""

    FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.operations += 1
        if function.overloadpacket.__name__ in self.FORBIDDEN:
            self.found.append(str(function))
        return function(*arguments, **(options or {}))


def test_a_step_never_makes_the_host_wait_for_the_device() -> None:
    model, scenes, null = denoiser()
    average, optimizer = deepcopy(model), torch.optim.AdamW(model.parameters(), fused=True)
    share = torch.tensor(0.5)
    step = training_step(model, average, share, optimizer, TrainingData(scenes.sample, null), RECIPE)
    step(torch.arange(4))  # the optimizer's first step makes its state
    with HostReads() as reads:
        loss, norm = step(torch.arange(4, 8))
    assert reads.operations > 1000
    assert reads.found == []
    assert loss > 0
    assert norm > 0


def test_a_step_draws_by_image_index_and_follows_its_rate_and_share() -> None:
    metrics = []
    for images in ([0, 1], [0, 1], [2, 3]):
        model, scenes, null = denoiser()
        average, optimizer = deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        share = torch.tensor(0.25)
        step = training_step(model, average, share, optimizer, TrainingData(scenes.sample, null), RECIPE)
        before = model.transformer.proj_out.weight.detach().clone()
        metrics.append(step(torch.tensor(images)))
        moved = model.transformer.proj_out.weight - before
        assert moved.any()
        torch.testing.assert_close(average.transformer.proj_out.weight - before, moved / 4, atol=1e-7, rtol=1e-3)
    assert torch.equal(metrics[0], metrics[1])
    assert not torch.equal(metrics[0], metrics[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_on_a_gpu_continues_with_the_same_bits(tmp_path: Path) -> None:
    from distill.worlds.denoiser import fit

    cuda = torch.device("cuda")
    recipe = RECIPE.model_copy(update={"images": 80, "batch": 8})  # of ten steps seven are replays of a graph

    def training(folder: Path) -> tuple[Any, Iterator[TrainingProgress]]:
        model, scenes, null = denoiser(cuda)
        average = deepcopy(model)
        data = TrainingData(scenes.sample, null)
        return average, fit(model, average, data, recipe, folder, range(recipe.images), compiled=False)

    whole, progress = training(tmp_path / "whole")
    list(progress)
    _, progress = training(tmp_path / "stopped")
    list(islice(progress, 5))[-1].save()
    resumed, progress = training(tmp_path / "stopped")
    assert len(list(progress)) == 5
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_fine_denoiser_starts_from_the_mean_of_the_coarse_ones_quadrants() -> None:
    torch.manual_seed(0)
    tokenizer = build_clip_tokenizer(vocabulary(), TOKENS)
    coarse, fine = (make_denoiser(tokenizer, patch) for patch in (COARSE, FINE))
    torch.nn.init.normal_(coarse.transformer.proj_out.weight)
    refine(coarse, fine)
    # An image that repeats in every quadrant of a patch enters as half of what it was, positions and bias aside.
    x = torch.randn(1, 4, FINE, FINE).repeat(1, 1, COARSE // FINE, COARSE // FINE)
    into, out = coarse.transformer.pos_embed.proj, fine.transformer.pos_embed.proj
    expected = into(x)[..., 0, 0] - into.bias
    assert torch.allclose(out(x)[..., 0, 0] - out.bias, expected / 2, atol=1e-5)
    # A hidden state leaves as the mean of its four quadrants' pixels.
    h = torch.randn(1, coarse.transformer.inner_dim)
    pixels = coarse.transformer.proj_out(h).view(2, FINE, 2, FINE, 4).mean(dim=(0, 2))
    assert torch.allclose(fine.transformer.proj_out(h).view(FINE, FINE, 4), pixels, atol=1e-5)
    assert torch.equal(fine.text_encoder.text_projection.weight, coarse.text_encoder.text_projection.weight)


def test_the_command_starts_from_a_teacher_and_records_its_recipe(trained: Path, tmp_path: Path) -> None:
    given = {"images": 8, "batch": 4, "scenes": 16, "learning_rate": 0.0, "per_task": 1, "warmup": 4, "decay": 4,
             "ema_half_life": 5, "evaluate_every": 4, "checkpoint_every": 4, "seed": 7}  # fmt: skip
    weights = "{two_object: .28, counting: .26, position: .13, color_attr: .13, single_object: .1, colors: .1}"
    settings = {**given, "start": trained, "task_weights": weights}

    def train(**changed: Any) -> None:
        sets = [f"--set={name}={value}" for name, value in (settings | changed).items()]
        result = invoke("teacher", "--out", str(tmp_path), "--device", "cpu", *sets)
        assert result.exit_code == 0, result.output

    train()
    record = json.loads((tmp_path / "onestep.json").read_text())
    recipe = record["recipe"]
    assert given.items() <= recipe.items()
    assert recipe["task_weights"]["two_object"] == 0.28
    assert (recipe["start"], recipe["vae_images"], recipe["coarse_images"]) == (str(trained), None, 0)
    assert (recipe["betas"], recipe["clip"], recipe["caption_dropout"]) == ([0.9, 0.98], 1.0, 0.1)
    for name in ("transformer", "text_encoder", "vae"):  # at a rate of 0 all weights stay where they start
        files = [next((folder / name).glob("*.safetensors")) for folder in (trained, tmp_path)]
        one, other = map(load_file, files)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (tmp_path / f"patch-{COARSE}-state").exists()
    state = checkpoint.latest(tmp_path / f"patch-{FINE}-state")
    assert state is not None
    assert checkpoint.load_record(state)["recipe"] == recipe
    check_teacher_folder(longer := ScenesRecipe(**recipe | {"images": 12}), tmp_path)
    list(train_teacher(longer, tmp_path, CPU, scales=(2.5,)))  # its own pipeline is replaced
    assert json.loads((tmp_path / "onestep.json").read_text())["recipe"]["images"] == 12


def test_a_training_replaces_no_model_that_was_not_trained_there(teacher: Path, trained: Path, tmp_path: Path) -> None:
    started = RECIPE.model_copy(update={"start": str(trained), "vae_images": None, "coarse_images": 0})
    for recipe in (RECIPE, started):
        with pytest.raises(OutputError, match="but no state of this training"):
            check_teacher_folder(recipe, teacher)
    shutil.copy(trained / SCENES, tmp_path)
    check_teacher_folder(started, tmp_path)  # stopped before its first state
    (tmp_path / "vae").mkdir()
    with pytest.raises(OutputError, match="holds vae"):
        check_teacher_folder(RECIPE, tmp_path)
    check_teacher_folder(RECIPE, trained)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / SCENES).write_text("mine")
    with pytest.raises(OutputError, match=r"holds scenes\.safetensors"):
        check_teacher_folder(started, tmp_path / "other")


def test_a_teacher_of_another_architecture_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="images of 16 pixels"):
        check_start_folder(make_teacher(tmp_path))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task_weights.kites=2", "task_weights.kites: Input should be 'single_object', "),
        ("task_weights={counting: -1}", "task_weights.counting: Input should be greater than or equal to 0, not -1"),
        ("task_weights={counting: .nan}", "task_weights.counting: Input should be "),
        ("task_weights={counting: 0}", "task_weights: all are 0"),
        ("images=600000", "images are not more than the 660000 on large patches"),
        ("learning_rate=2", "learning_rate: Input should be less than or equal to 1, not 2"),
        ("sizes=8", "unknown key 'sizes'"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(setting: str, message: str, tmp_path: Path) -> None:
    result = invoke("teacher", "--out", str(tmp_path / "out"), "--set", setting)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_start_has_no_large_patches() -> None:
    with pytest.raises(ValueError, match="training with start has no large patches"):
        ScenesRecipe(start="somewhere", coarse_images=8)


def test_a_recipe_is_refused_before_torch_is_imported() -> None:
    code = "import sys; from distill.cli import main; sys.argv[1:] = ['teacher', '--set', 'kites=1']\n"
    code += "try: main()\nfinally: print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "False\n")
