"""Encoding of pixels as PNG, JPEG or WebP. Deterministic; runs in a thread pool of the server."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.images.provenance import Provenance, image_metadata

PNG_LEVEL = 1  # takes a fifth of the default level's time, for a few percent more bytes


def encode(
    pixels: NDArray[np.uint8], output_format: str, compression: int, provenance: Provenance | None = None
) -> bytes:
    """Bytes of one image (H, W, 3), labeled with its provenance if one is given.

    `compression` is OpenAI's 0 to 100, the quality of JPEG and WebP.
    """
    image = Image.fromarray(pixels)
    metadata = image_metadata(provenance, output_format) if provenance else {}
    buffer = io.BytesIO()
    match output_format:
        case "png":
            image.save(buffer, "PNG", compress_level=PNG_LEVEL, **metadata)
        case "jpeg":
            image.save(buffer, "JPEG", quality=compression, **metadata)
        case "webp":
            image.save(buffer, "WEBP", quality=compression, **metadata)
        case _:
            raise ValueError(f"no output format {output_format!r}")
    return buffer.getvalue()
