"""GenEval's prompts as images in the folders that its scorer reads (Ghosh et al., arXiv 2310.11513).

OUT/00000/metadata.jsonl     the prompt's own line of the prompts file
OUT/00000/samples/0000.png   and on, one an image
OUT/images.json              what made the images, so that no others are added to them
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
class Question:
    """A line of the prompts file as it stands, and its prompt."""

    line: str
    prompt: str


def read_questions(path: Path) -> list[Question]:
    """The lines of GenEval's `evaluation_metadata.jsonl`. Raises PromptError for a file that is not of its form."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read ({error}); give GenEval's evaluation_metadata.jsonl") from error
    questions = [_question(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise PromptError(f"{path} holds no prompts; give GenEval's evaluation_metadata.jsonl")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        prompt = json.loads(line)["prompt"]
        prompt.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise PromptError(f'{where}: not a JSON object with a "prompt"; give GenEval\'s evaluation_metadata.jsonl')
    return Question(line, prompt)


def render(
    questions: Sequence[Question],
    generate: Generate,
    made_with: Mapping[str, Any],
    images: int,
    seed: int,
    batch: int,
    out: Path,
) -> Iterator[int]:
    """Write `images` of each question, and yield how many are there; those that are there already are kept.

    Image k of question i has the seed `seed + k * questions + i`: it stays the same when more images are asked for.
    Raises RunError when `out` holds images of another model, setting, seed or file of prompts, OutputError when it does
    not say what made them.
    """
    _record({**made_with, "seed": seed, "prompts": [question.line for question in questions]}, out / RECORD)
    for i, question in enumerate(questions):
        if not (_folder(out, i) / "metadata.jsonl").exists():
            atomic_write_text(_folder(out, i) / "metadata.jsonl", question.line + "\n")

    every = list(product(range(len(questions)), range(images)))
    missing = [(i, k) for i, k in every if not _sample(out, i, k).exists()]
    done = len(every) - len(missing)
    yield done
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        prompts = [questions[i].prompt for i, _ in part]
        seeds = [seed + k * len(questions) + i for i, k in part]
        made = generate(prompts, seeds)
        for (i, k), prompt, own, image in zip(part, prompts, seeds, made, strict=True):
            save_image(Image.fromarray(image), prompt, own, _sample(out, i, k))
        done += len(part)
        yield done


def _folder(out: Path, question: int) -> Path:
    return out / f"{question:05d}"


def _sample(out: Path, question: int, image: int) -> Path:
    return _folder(out, question) / "samples" / f"{image:04d}.png"


def _record(record: Mapping[str, Any], path: Path) -> None:
    """Keep what makes the images, or hold it against what made those that are there."""
    if not path.exists():
        if any(path.parent.glob("[0-9]" * 5)):
            raise OutputError(
                f"{path.parent} holds images, and no {RECORD} that says what made them; give another --out"
            )
        atomic_write_text(path, json.dumps(record, indent=2) + "\n")
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in record if kept[key] != record[key]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as what made the images beside it; give another --out") from error
    if different:
        raise RunError(
            f"{path.parent} holds images made with another {different[0]}; set it back, or give another --out"
        )
