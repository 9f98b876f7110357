"""Images of the teacher, guided and in many steps, that a student's images are compared with.

FOLDER/DIGEST/references.json   teacher, sampling, size, prompts and seeds, of which DIGEST is the digest
FOLDER/DIGEST/00000.png         the images, with their prompt and seed

They are made once and kept. Other settings have another digest, so that runs may share a folder.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill.evaluate.base import Images
from distill.evaluate.evaluator import digest_of
from distill.evaluate.generate import save_image
from distill.evaluate.image_files import read_pixels
from distill.evaluate.sampler import Sampling, TeacherSampler
from distill.files import atomic_write_text
from distill.models.sd3_folder import SD3Folder

RECORD = "references.json"
BATCH = 16  # images that are generated together
REPEAT_EVERY = 16  # every so many images, the prompt is repeated for diversity
REPEAT_SEEDS = 4


def image_count(images: int) -> int:
    """The number of images for `images` prompts, with those for diversity."""
    return images + REPEAT_SEEDS * -(-images // REPEAT_EVERY)


@dataclass(frozen=True)
class ReferenceProgress:
    """Images of the teacher that exist, and how many there will be."""

    images: int
    total: int


class References:
    """The images of a teacher for `images` prompts, and REPEAT_SEEDS more for every REPEAT_EVERY-th of them.

    Fewer prompts than `images` are repeated with other seeds. Seeds count up from 0, whatever the seed of a run.
    """

    def __init__(
        self,
        folder: Path,
        teacher: SD3Folder,
        sampling: Sampling,
        size: tuple[int, int],
        prompts: Sequence[str],
        images: int,
    ) -> None:
        """Describe the images; nothing is made. `size` is (width, height) in pixels."""
        first = list(islice(cycle(prompts), images))
        self.images = images
        self.texts = [*first, *(text for text in first[::REPEAT_EVERY] for _ in range(REPEAT_SEEDS))]
        self.seeds = range(len(self.texts))
        self.teacher, self.sampling, self.size = teacher, sampling, size
        self._record = {
            "teacher": teacher.digest,
            "max_sequence_length": teacher.max_sequence_length,
            "sampling": sampling.as_dict(),
            "size": size,
            "prompts": self.texts,
            "seeds": list(self.seeds),
        }
        self.digest = digest_of(self._record)
        self.folder = folder / self.digest[:16]

    @property
    def period(self) -> int:
        """Side of the transformer's patches in image pixels."""
        return self.teacher.vae_scale_factor * self.teacher.patch_size

    def batches(self) -> Iterator[slice]:
        """The images that are generated and measured together."""
        return (slice(start, start + BATCH) for start in range(0, len(self.texts), BATCH))

    def missing(self) -> list[slice]:
        """The batches of which an image does not exist. Whole batches are made, so that a resumed call is the same."""
        return [batch for batch in self.batches() if not all(path.exists() for path in self._paths(batch))]

    def make(
        self, device: torch.device, load: Callable[[], TeacherSampler] | None = None
    ) -> Iterator[ReferenceProgress]:
        """Generate what is missing; yield the progress. Raises TeacherError, DistillError if writing fails.

        `load` loads a sampler that the caller uses too; without it the teacher is loaded with the missing texts alone.
        """
        missing = self.missing()
        if not missing:
            return
        total = len(self.texts)
        done = total - sum(len(self.texts[batch]) for batch in missing)
        yield ReferenceProgress(done, total)
        atomic_write_text(self.folder / RECORD, json.dumps(self._record, indent=2) + "\n")
        if load is None:
            texts = [text for batch in missing for text in self.texts[batch]]
            sampler = TeacherSampler(self.teacher, device, texts, self.folder)
        else:
            sampler = load()
        shape = self.teacher.latent_shape_of(*self.size)
        for batch in missing:
            texts, seeds = self.texts[batch], self.seeds[batch]
            images = sampler.generate(self.sampling, texts, seeds, shape)
            for image, text, seed, path in zip(images, texts, seeds, self._paths(batch), strict=True):
                save_image(Image.fromarray(image), text, seed, path)
            done += len(texts)
            yield ReferenceProgress(done, total)

    def read(self, batch: slice) -> Images:
        """Read the images of a batch (B, H, W, 3). Raises ScorerError for one that cannot be decoded."""
        return np.stack([read_pixels(path) for path in self._paths(batch)])

    def _paths(self, batch: slice) -> list[Path]:
        return [self.folder / f"{index:05d}.png" for index in range(len(self.texts))[batch]]
