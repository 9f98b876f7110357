"""The binary version of CIFAR-10: records of a label and 3072 bytes (red, green and blue planes of 32 x 32 pixels)."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.data.images import METADATA
from distill.errors import ImageError, OutputError
from distill.files import atomic_write_text
from distill.report.grid import save_png

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ANY = "image"  # the caption of every image for an unconditional model
SIDE = 32

_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = ("test_batch.bin",)
_RECORD = 1 + 3 * SIDE**2


def read_images(folder: Path, test: bool = False) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read images (N, 32, 32, 3) and labels (N,) of the training or test batches. Raises ImageError."""
    records = np.concatenate([_records(folder / name) for name in (_TEST if test else _TRAIN)])
    planes = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0]


def captions(labels: NDArray[np.uint8], conditional: bool) -> list[str]:
    """Return the class name of each image, or the same caption for all."""
    return [CLASSES[label] if conditional else ANY for label in labels]


def write_images(folder: Path, out: Path, conditional: bool, test: bool = False) -> Iterator[int]:
    """Write the images as PNG files and their captions as metadata.jsonl; yield the number of images written.

    `distill encode` and `distill score --reference` read such a folder. Raises OutputError when `out` holds other
    images, ImageError when writing fails.
    """
    images, labels = read_images(folder, test)
    names = [f"{i:05d}.png" for i in range(len(images))]
    lines = [{"file_name": name, "text": text} for name, text in zip(names, captions(labels, conditional), strict=True)]
    listed = "".join(json.dumps(line) + "\n" for line in lines)
    try:
        if (out / METADATA).exists() and (out / METADATA).read_text(encoding="utf-8", errors="replace") != listed:
            raise OutputError(f"{out / METADATA} lists other images; give another --out")
        for i, (name, image) in enumerate(zip(names, images, strict=True), 1):
            save_png(Image.fromarray(image), out / name)
            yield i
        atomic_write_text(out / METADATA, listed)
    except OSError as error:
        raise ImageError(f"could not write images to {out}: {error}; make room and run the same command") from error


def _records(path: Path) -> NDArray[np.uint8]:
    try:
        values = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ImageError(
            f"{path} cannot be read ({error.strerror}); give the folder of CIFAR-10's binary version, "
            "cifar-10-batches-bin"
        ) from None
    if not len(values) or len(values) % _RECORD:
        raise ImageError(f"{path} is {len(values)} bytes, not records of {_RECORD}; it is cut off; download it again")
    records = values.reshape(-1, _RECORD)
    if records[:, 0].max() >= len(CLASSES):
        raise ImageError(f"{path} holds a label of {records[:, 0].max()}; CIFAR-10's are 0 to {len(CLASSES) - 1}")
    return records
