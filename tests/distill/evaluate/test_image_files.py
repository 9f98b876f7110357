"""Image files are read upright, in sRGB and on white."""

import numpy as np
from PIL import Image

from distill.evaluate.image_files import read_pixels, size_of
from distill.evaluate.image_folder import find_images


def test_photos_are_read_upright_and_in_srgb(tmp_path):
    wide = Image.fromarray(np.full((4, 8, 4), (200, 100, 50, 0), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "a.png", exif=exif)
    Image.new("I;16", (4, 8), 65535).save(tmp_path / "b.png")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves")
    paths = find_images(tmp_path)
    assert [path.name for path in paths] == ["a.png", "b.png"]
    assert [size_of(path) for path in paths] == [(4, 8), (4, 8)]
    assert all((read_pixels(path) == np.full((8, 4, 3), 255)).all() for path in paths)  # white is behind the clear one
