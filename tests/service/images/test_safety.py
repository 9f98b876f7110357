"""The safety check of generated images."""

import numpy as np
import openai
import pytest
from running import metric

from service.app import create_app
from service.errors import StartError
from service.images.safety import NudeNet, load_checker
from service.settings import Settings


class Bright:
    """A check that blocks bright images, and with lenient moderation only the brightest."""

    def __call__(self, pixels, moderation):
        return "glare" if pixels.mean() > {"auto": 100, "low": 200}[moderation] else None


def test_a_blocked_image_is_a_moderation_error(serve, connect):
    url = serve(images={"safety": f"{__name__}:Bright"})
    client = connect(url)
    brightness = {seed: np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8).mean() for seed in range(200)}
    dark, fair = (next(s for s, b in brightness.items() if low < b < high) for low, high in ((0, 90), (110, 190)))
    client.images.generate(prompt="x", extra_body={"seed": dark})
    client.images.generate(prompt="x", moderation="low", extra_body={"seed": fair})
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="x", extra_body={"seed": fair})
    assert (refused.value.code, refused.value.type) == ("moderation_blocked", "image_generation_user_error")
    assert "glare" in refused.value.message
    assert metric(url, "blocked_images_total") == 1
    assert metric(url, "stage_seconds_count", stage="safety") == 3


def test_nudenet_passes_plain_images():
    check = NudeNet()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert [check(image, "auto") for image in (noise, np.full_like(noise, 127))] == [None, None]


def test_nudenet_blocks_by_class_and_score(monkeypatch):
    check = NudeNet()
    image = np.zeros((64, 64, 3), np.uint8)
    found = [{"class": "BUTTOCKS_EXPOSED", "score": 0.5, "box": [0, 0, 1, 1]}, {"class": "FACE_MALE", "score": 0.9}]
    monkeypatch.setattr(check._detector, "detect", lambda pixels: found)
    assert check(image, "auto") == "nudity"
    assert check(image, "low") is None
    found.pop(0)
    assert check(image, "auto") is None


@pytest.mark.parametrize(
    "name", ["nothing.here:SafetyChecker", "service.images.safety:Nobody", "service.images.safety"]
)
def test_a_check_that_cannot_be_loaded_is_refused_at_start(name):
    with pytest.raises(StartError, match="safety"):
        create_app(Settings(images={"safety": name}))


def test_there_is_no_check_by_default():
    assert load_checker(None) is None
