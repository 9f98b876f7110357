"""The teacher's own images have the best values; blur, a grid, lost contrast and mode collapse have worse ones."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from distill.evaluate.clip import Clip
from distill.evaluate.reference_evaluator import ReferenceEvaluator, cell_features
from distill.evaluate.references import References
from distill.evaluate.sampler import Sampling
from distill.methods.policies import TeacherGuidance
from distill.models.sd3_folder import SD3Folder
from distill.models.vae import to_pixels

WORDS = ["red", "blue", "circle", "square", "left", "of", "and", "a"]
SIZE = 32


def encode(images: np.ndarray) -> torch.Tensor:
    """Latents (N, 3, 16, 16) of a stand-in for an autoencoder."""
    return torch.nn.functional.avg_pool2d(to_pixels(images), 2)


def scene(text: str, seed: int) -> np.ndarray:
    """A smooth image with noise, which depends on the prompt and the seed."""
    rng = np.random.default_rng((seed, len(text), *text.encode()))
    coarse = Image.fromarray(rng.integers(40, 215, (4, 4, 3), dtype=np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
    return (np.asarray(coarse) + rng.normal(0, 12, (SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)


def generate(texts, seeds) -> np.ndarray:
    return np.stack([scene(text, seed) for text, seed in zip(texts, seeds, strict=True)])


@pytest.fixture(scope="module")
def evaluator(teacher, tmp_path_factory) -> ReferenceEvaluator:
    """Make an evaluator that compares with images of `generate` for other seeds."""
    folder = tmp_path_factory.mktemp("references")
    found = References(folder, SD3Folder.read(teacher), Sampling(1, TeacherGuidance(scale=1)), (SIZE, SIZE), WORDS, 64)
    for index, text in enumerate(found.texts):
        found.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(text, 1000 + index)).save(found.folder / f"{index:05d}.png")
    return ReferenceEvaluator(found)


def changed(change):
    return lambda texts, seeds: np.stack([change(image) for image in generate(texts, seeds)])


def blurred(image):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))


def gray(image):
    return (128 + (image - 128.0) / 2).astype(np.uint8)


def patched(image):
    seams = np.zeros((SIZE, SIZE, 1))
    seams[::4], seams[:, ::4] = 20, 20  # the tiny teacher's patches: 2 x 2 latents of 2 x 2 pixels
    return (image + seams).clip(0, 255).astype(np.uint8)


def test_another_sample_of_the_teacher_is_as_good_as_the_teacher(evaluator) -> None:
    sizes: list[int] = []
    found = evaluator.evaluate(generate, encode, sizes.append)
    assert sum(sizes) == evaluator.count == 64 + 4 * 4
    assert found.metrics["kernel"] == pytest.approx(0, abs=0.1)
    assert found.metrics["relative_diversity"] == pytest.approx(1, abs=0.15)
    assert found.metrics["grid"] == pytest.approx(1, abs=0.1)
    assert found.metrics["saturation"] == pytest.approx(found.teacher["saturation"], abs=0.02)
    assert found.metrics == evaluator.evaluate(generate, encode).metrics
    same = evaluator.evaluate(lambda texts, seeds: generate(texts, [1000 + seed for seed in seeds]), encode)
    assert same.metrics == pytest.approx(same.teacher, abs=1e-6)


@pytest.mark.parametrize("change", [blurred, gray, patched])
def test_a_worse_student_is_farther_from_the_teacher(evaluator, change) -> None:
    good, bad = (evaluator.evaluate(each, encode).metrics for each in (generate, changed(change)))
    assert bad["kernel"] > good["kernel"] + 0.2
    assert bad["frechet"] > good["frechet"]
    assert (bad["grid"] > 1.5) is (change is patched)


def test_a_student_that_ignores_its_noise_has_no_diversity(evaluator) -> None:
    found = evaluator.evaluate(lambda texts, seeds: generate(texts, [0] * len(seeds)), encode)
    assert found.metrics["relative_diversity"] == 0


def test_the_picture_shows_the_prompts_that_differ_most(evaluator) -> None:
    def wrong(texts, seeds):
        images = generate(texts, [1000 + seed for seed in seeds])
        images[np.isin(seeds, (3, 5))] = 0
        return images

    picture = np.asarray(evaluator.evaluate(wrong, encode).picture)
    assert (picture == 0).all(axis=-1).sum() >= 2 * 120 * 120  # both black tiles


def test_features_do_not_depend_on_the_size_of_the_image() -> None:
    small, large = (cell_features(torch.randn(3, 16, side, side)) for side in (16, 128))
    assert small.shape == large.shape == (3, 192)


def test_a_clip_model_may_decide(evaluator, clip_folder) -> None:
    clip = Clip(clip_folder, torch.device("cpu"))
    scored = ReferenceEvaluator(evaluator._references, clip, "clip_score")
    assert scored.higher_is_better
    assert not evaluator.higher_is_better
    assert scored.digest != evaluator.digest
    found = scored.evaluate(generate, encode)
    expected = clip.scores(generate(scored.prompts[:64], range(64)), scored.prompts[:64])
    assert found.metrics["clip_score"] == pytest.approx(expected.mean())
    assert "clip_score" in found.teacher
