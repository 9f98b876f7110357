"""Measure the cost of image formats: milliseconds on one core and bytes, of the server's encoder and its alternatives.

The image is the shipped student's, enlarged; OpenCV's PNG is measured where it is installed.

    python benchmarks/formats.py [--sizes 64 512 1024] [--repeats 5]
"""

import argparse
import io
import statistics
import time
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from distill.pipeline import SHIPPED_STUDENT, OneStepPipeline
from service.images.png import encode_png


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode with Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encoders() -> dict[str, Callable[[Image.Image], bytes]]:
    """Return the encoders by name."""
    known: dict[str, Callable[[Image.Image], bytes]] = {
        "PNG, the server's": lambda image: encode_png(np.asarray(image), {}),
        "PNG level 1, RLE": lambda image: save(image, "PNG", compress_level=1, compress_type=zlib.Z_RLE),
    }
    known |= {
        f"PNG level {level}": lambda image, level=level: save(image, "PNG", compress_level=level)
        for level in (0, 1, 3, 6)
    }
    for method in (0, 4):
        known[f"WebP lossless, method {method}"] = lambda image, method=method: save(
            image, "WEBP", lossless=True, quality=0, method=method
        )
    known["WebP quality 100"] = lambda image: save(image, "WEBP", quality=100)
    known["JPEG quality 95"] = lambda image: save(image, "JPEG", quality=95)
    try:
        import cv2
    except ImportError:
        return known
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    known["OpenCV PNG level 1, RLE"] = lambda image: cv2.imencode(".png", np.asarray(image)[..., ::-1], options)[
        1
    ].tobytes()
    return known


def main() -> None:
    """Measure all encoders and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    (pixels,) = OneStepPipeline.load(SHIPPED_STUDENT)(["a red circle left of a blue star"], [0])
    print("| size | format | ms | KB |\n|---|---|---|---|")
    for size in arguments.sizes:
        image = Image.fromarray(pixels.numpy()).resize((size, size), Image.Resampling.BICUBIC)
        for name, encode in encoders().items():
            seconds = []
            for _ in range(arguments.repeats):
                began = time.perf_counter()
                data = encode(image)
                seconds.append(time.perf_counter() - began)
            print(f"| {size} | {name} | {1000 * statistics.median(seconds):.2f} | {len(data) / 1000:.1f} |")


if __name__ == "__main__":
    main()
