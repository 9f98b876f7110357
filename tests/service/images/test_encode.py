"""Pixels to bytes."""

import io

import numpy as np
import pytest
from PIL import Image

from service.images.encode import encode
from service.images.png import encode_png


@pytest.fixture
def pixels() -> np.ndarray:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    return np.stack([np.broadcast_to(ramp, (48, 64)), np.broadcast_to(ramp[::-1], (48, 64)), np.full((48, 64), 9)], -1)


def test_png_keeps_every_pixel_and_the_same_bytes(pixels):
    data = encode(pixels.astype(np.uint8), "png", 100)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert encode(pixels.astype(np.uint8), "png", 100) == data
    part = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)[1:, ::2]  # not contiguous, and no pattern
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(part, "png", 100)))), part)


def test_png_texts_are_read_in_any_alphabet(pixels):
    texts = {"Software": "ours 1", "Description": "model é 星"}
    image = Image.open(io.BytesIO(encode_png(pixels.astype(np.uint8), texts)))
    image.verify()  # the checksum of each chunk
    assert image.info == texts


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_compression_is_quality(pixels, name):
    low, high = (encode(pixels.astype(np.uint8), name, quality) for quality in (5, 100))
    assert len(low) < len(high)
    error = np.abs(np.asarray(Image.open(io.BytesIO(high))).astype(int) - pixels)
    assert error.mean() < 4
