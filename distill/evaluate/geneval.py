"""Images of GenEval's prompts, in the folders that its scorer reads (Ghosh et al., arXiv 2310.11513).

OUT/00000/metadata.jsonl     the line of the prompt in the prompts file
OUT/00000/samples/0000.png   the images of the prompt, numbered from 0
OUT/images.json              model, settings, seed and prompts, so that a later call adds only matching images
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from distill.errors import OutputError, PromptError, RunError
from distill.evaluate.base import Generate
from distill.evaluate.generate import save_image
from distill.files import atomic_write_text

RECORD = "images.json"


@dataclass(frozen=True)
class GenevalPrompt:
    """A line of the prompts file, unchanged, and its prompt."""

    line: str
    prompt: str


def read_geneval_prompts(path: Path) -> list[GenevalPrompt]:
    """Read the lines of GenEval's `evaluation_metadata.jsonl`. Raises PromptError for another file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read ({error}); give GenEval's evaluation_metadata.jsonl") from error
    prompts = [_parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise PromptError(f"{path} holds no prompts; give GenEval's evaluation_metadata.jsonl")
    return prompts


def _parse_line(line: str, where: str) -> GenevalPrompt:
    try:
        prompt = json.loads(line)["prompt"]
        prompt.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise PromptError(f'{where}: not a JSON object with a "prompt"; give GenEval\'s evaluation_metadata.jsonl')
    return GenevalPrompt(line, prompt)


def generate_geneval_images(
    prompts: Sequence[GenevalPrompt],
    generate: Generate,
    settings: Mapping[str, Any],
    images: int,
    seed: int,
    batch: int,
    out: Path,
) -> Iterator[int]:
    """Write `images` images of each prompt, except those that exist; yield the number of images that exist.

    Image k of prompt i has the seed `seed + k * len(prompts) + i`, so that it does not depend on `images`. Raises
    RunError if `out` holds images of another model, setting, seed or prompts file, and OutputError if it holds images
    without a record of them.
    """
    _check_record({**settings, "seed": seed, "prompts": [prompt.line for prompt in prompts]}, out / RECORD)
    for i, prompt in enumerate(prompts):
        if not (_folder(out, i) / "metadata.jsonl").exists():
            atomic_write_text(_folder(out, i) / "metadata.jsonl", prompt.line + "\n")

    every = list(product(range(len(prompts)), range(images)))
    missing = [(i, k) for i, k in every if not _sample(out, i, k).exists()]
    done = len(every) - len(missing)
    yield done
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        texts = [prompts[i].prompt for i, _ in part]
        seeds = [seed + k * len(prompts) + i for i, k in part]
        generated = generate(texts, seeds)
        for (i, k), text, image_seed, image in zip(part, texts, seeds, generated, strict=True):
            save_image(Image.fromarray(image), text, image_seed, _sample(out, i, k))
        done += len(part)
        yield done


def _folder(out: Path, prompt: int) -> Path:
    return out / f"{prompt:05d}"


def _sample(out: Path, prompt: int, image: int) -> Path:
    return _folder(out, prompt) / "samples" / f"{image:04d}.png"


def _check_record(record: Mapping[str, Any], path: Path) -> None:
    """Write the record of the images, or compare it with the record of those that exist."""
    if not path.exists():
        if any(path.parent.glob("[0-9]" * 5)):
            raise OutputError(f"{path.parent} holds images, but no {RECORD} of their settings; give another --out")
        atomic_write_text(path, json.dumps(record, indent=2) + "\n")
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in record if kept[key] != record[key]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is not the record of the images in its folder; give another --out") from error
    if different:
        raise RunError(f"{path.parent} holds images of another {different[0]}; set it back, or give another --out")
