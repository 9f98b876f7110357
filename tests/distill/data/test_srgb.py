"""Images of every mode and color profile are converted to the sRGB that a viewer shows."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distill.data.srgb import to_srgb

COLOR = (200, 100, 50)
ADOBE_IN_SRGB = (227, 100, 42)  # what these numbers of Adobe RGB are


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*values)


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256)) + b"\0\0"


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile: header, table of tags, and their data."""
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249), **tags}
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, body in tags.items():
        table += name + struct.pack(">II", start + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4xI4s4s4s12x4s28x", start + len(data), 0x02400000, kind, space, connection, b"acsp")
    header += fixed(0.9642, 1, 0.8249)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + data


def cmyk() -> bytes:
    """Inks that only darken, whatever their color: a quarter each."""
    ramp = bytes(range(256))
    grid = b"".join(bytes((255 * (4 - bin(corner).count("1")) // 4, 128, 128)) for corner in range(16))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + grid + ramp * 3
    return profile(b"CMYK", b"Lab ", {b"A2B0": lut})


ADOBE = profile(
    b"RGB ",
    b"XYZ ",
    {
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(2.2)),
    },
)
LINEAR_GRAY = profile(b"GRAY", b"XYZ ", {b"kTRC": gamma(1)})


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def png(depth: int, kind: int, row: bytes, clear: bytes = b"") -> Image.Image:
    """A PNG of two pixels, in depths that Pillow does not write."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0), b"tRNS": clear}
    chunks |= {b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    file = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks.items():
        if data or name == b"IEND":
            file += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return Image.open(io.BytesIO(file))


def plain(mode: str, color: object) -> Image.Image:
    return Image.new(mode, (2, 2), color)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (saved(plain("RGB", COLOR), icc_profile=ADOBE), ADOBE_IN_SRGB),
        (saved(plain("RGB", COLOR), "JPEG", quality=100, icc_profile=ADOBE), ADOBE_IN_SRGB),
        (saved(plain("RGB", COLOR), "WEBP", lossless=True, icc_profile=ADOBE), ADOBE_IN_SRGB),
        (saved(plain("RGB", COLOR).convert("P", palette=Image.Palette.ADAPTIVE), icc_profile=ADOBE), ADOBE_IN_SRGB),
        (saved(plain("RGBA", (*COLOR, 255)), icc_profile=ADOBE), ADOBE_IN_SRGB),
        (saved(plain("RGBA", (*COLOR, 0)), icc_profile=ADOBE), (255, 255, 255)),
        (saved(plain("L", 128), icc_profile=LINEAR_GRAY), (188, 188, 188)),
        (saved(plain("LA", (128, 255)), icc_profile=LINEAR_GRAY), (188, 188, 188)),
        (saved(plain("L", 128), "JPEG", icc_profile=ADOBE), (129, 129, 129)),
        (saved(plain("CMYK", (0, 255, 0, 0)), "JPEG", icc_profile=cmyk()), (185, 185, 185)),
        (saved(plain("CMYK", (0, 255, 0, 0)), "JPEG"), (255, 0, 255)),
        (saved(plain("RGB", COLOR), icc_profile=LINEAR_GRAY), COLOR),  # of another color space
        (saved(plain("RGB", COLOR), icc_profile=ADOBE[:200]), COLOR),
        (saved(plain("RGB", COLOR), icc_profile=b"damaged"), COLOR),
        (saved(plain("1", 1)), (255, 255, 255)),
        (saved(plain("RGB", COLOR), transparency=COLOR), (255, 255, 255)),
        (saved(plain("RGB", COLOR).convert("P", palette=Image.Palette.ADAPTIVE), transparency=0), (255, 255, 255)),
        (png(16, 0, struct.pack(">2H", 257 * 77, 0)), (77, 77, 77)),
        (png(16, 0, struct.pack(">2H", 300, 301), struct.pack(">H", 300)), (255, 255, 255)),
        (png(16, 0, struct.pack(">2H", 300, 301), struct.pack(">H", 301)), (1, 1, 1)),
        (png(16, 2, struct.pack(">6H", *(257 * value for value in COLOR), 0, 0, 0)), COLOR),
        (
            png(16, 2, struct.pack(">6H", 51400, 25700, 12850, 0, 0, 0), struct.pack(">3H", 51400, 25700, 12850)),
            (255,) * 3,
        ),
        (png(16, 4, struct.pack(">4H", 257 * 77, 65535, 0, 0)), (77, 77, 77)),
        (png(16, 6, struct.pack(">8H", 51400, 25700, 12850, 0, 0, 0, 0, 0)), (255, 255, 255)),
        (png(4, 0, b"\x53"), (85, 85, 85)),
        (png(4, 0, b"\x53", struct.pack(">H", 5)), (255, 255, 255)),
        (png(2, 0, b"\x40", struct.pack(">H", 1)), (255, 255, 255)),
    ],
)
def test_a_pixel_is_what_a_viewer_shows_on_white(image: Image.Image, expected: tuple[int, ...]) -> None:
    found = to_srgb(image)
    assert found.mode == "RGB"
    np.testing.assert_allclose(found.getpixel((0, 0)), expected, atol=2)


def test_an_image_on_its_side_is_turned_and_keeps_its_profile() -> None:
    wide = Image.new("RGB", (4, 2), COLOR)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = to_srgb(saved(wide, "JPEG", quality=100, exif=exif, icc_profile=ADOBE))
    assert found.size == (2, 4)
    np.testing.assert_allclose(found.getpixel((0, 0)), ADOBE_IN_SRGB, atol=2)


def test_sixteen_bits_of_gray_keep_their_steps() -> None:
    steps = np.linspace(0, 65535, 256).astype(np.uint16)[None]
    assert np.asarray(to_srgb(saved(Image.fromarray(steps))))[0, :, 0].tolist() == list(range(256))
