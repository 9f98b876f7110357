"""Encoding of pixels as PNG, JPEG or WebP. Deterministic; runs in a thread pool of the server."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.images.png import encode_png
from service.images.provenance import Provenance, exif_metadata, png_texts


def encode(
    pixels: NDArray[np.uint8], output_format: str, compression: int, provenance: Provenance | None = None
) -> bytes:
    """Bytes of one image (H, W, 3), labeled with its provenance if one is given.

    `compression` is OpenAI's 0 to 100, the quality of JPEG and WebP.
    """
    if output_format == "png":
        return encode_png(pixels, png_texts(provenance) if provenance else {})
    metadata = exif_metadata(provenance) if provenance else {}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, output_format, quality=compression, **metadata)
    return buffer.getvalue()
