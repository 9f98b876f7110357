"""PNG files of RGB images (W3C's PNG specification), in half of Pillow's CPU time or less.

Pillow compares five filters in each row and has no option for one filter, which is why the server does not use it. Its
fastest settings, `compress_level=1` with `compress_type=Z_RLE`, take 2.0 times the CPU time of this encoder for images
of 64x64 pixels and 2.3 to 2.7 times for images of 1024x1024 (15 to 54 ms, and 6 to 24 ms here); their files have 0.90
and 0.75 to 0.79 of the bytes. Levels 1 to 6 without that strategy take 2.2 to 11 times, for 0.73 to 1.06 of the bytes.
Measured with metadata on a busy core: Pillow 13.0 on zlib-ng, zlib 1.2.13 here, images of the shipped student and
photographs. `benchmarks/formats.py` repeats it.
"""

import struct
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_UP = 2  # the filter: each byte less the one above it


def encode_png(pixels: NDArray[np.uint8], texts: Mapping[str, str]) -> bytes:
    """Return the file of one image (H, W, 3) with texts by their keywords, which are ASCII. Deterministic."""
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, 3 * width)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]  # above it are zeros
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256, as specified
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)  # the fastest, and of fewer bytes than level 1's own strategy
    chunks = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),  # 8 bits, RGB, not interlaced
        *(_text(keyword.encode("ascii"), text) for keyword, text in texts.items()),
        _chunk(b"IDAT", deflate.compress(filtered.data) + deflate.flush()),
        _chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _text(keyword: bytes, text: str) -> bytes:
    return _chunk(b"iTXt", keyword + 5 * b"\0" + text.encode())  # not compressed; no language, no translated keyword


def _chunk(kind: bytes, data: bytes) -> bytes:
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))])
