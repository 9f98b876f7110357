"""The world's own trainings: a stopped one ends where an uninterrupted one does, in a folder that diffusers runs."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import stock_pipeline

from distill import checkpoint
from distill.errors import CheckpointError
from distill.scenes.captions import vocabulary
from distill.scenes.train import COARSE, FINE, TOKENS, TeacherRecipe, make_denoiser, refine, train_teacher
from distill.scenes.vae import Progress, VaeRecipe, train_vae
from distill.spec import read_spec
from distill.tokenizer import build_clip_tokenizer

VAE = VaeRecipe(images=32, batch=16, judged=8)
RECIPE = TeacherRecipe(images=32, coarse_images=16, scenes=32, batch=8, per_task=1)
CPU = torch.device("cpu")


def stages(folder: Path) -> Iterator[Progress]:
    yield from train_vae(VAE, folder, CPU)
    yield from train_teacher(RECIPE, folder, CPU, compiled=False, scales=(2.5,))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    assert [progress.images for progress in stages(folder)] == [16, 32, 8, 16, 24, 32]
    return folder


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
    spec = read_spec(trained)
    pipeline = stock_pipeline(trained).to(torch.float32)
    image = pipeline("a red circle", num_inference_steps=2, max_sequence_length=spec.max_sequence_length).images[0]
    assert image.size == (spec.image_size, spec.image_size) == (64, 64)
    assert spec.patch_size == FINE


def test_another_recipe_does_not_continue_a_training(trained: Path) -> None:
    other = TeacherRecipe(images=64, coarse_images=16, scenes=32, batch=8, per_task=1, learning_rate=1e-4)
    with pytest.raises(CheckpointError, match=r"learning_rate = 0\.001, not 0\.0001"):
        list(train_teacher(other, trained, CPU, compiled=False))


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
