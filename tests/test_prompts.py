"""Every kind of source gives the same prompts; what is not one is refused by its file, and line where it has one."""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.errors import PromptError
from distill.prompts import read_prompts

PROMPTS = ["a red circle", "a blue, “odd” square", "zwölf Kreise"]


def write(path: Path) -> None:
    """The prompts in the format that the file's name says."""
    match path.suffix:
        case ".txt":
            path.write_bytes(("\ufeff" + "\r\n\n".join(PROMPTS)).encode())
        case ".jsonl":
            rows = [json.dumps(PROMPTS[0]), json.dumps({"id": 1, "caption": PROMPTS[1]}), ""]
            path.write_text("\n".join([*rows, json.dumps({"prompt": PROMPTS[2]})]), encoding="utf-8")
        case ".csv":
            path.write_text("id,text\n" + "".join(f'{i},"{p}"\n' for i, p in enumerate(PROMPTS)), encoding="utf-8")
        case ".parquet":
            pq.write_table(pa.table({"id": [0, 1, 2, 3], "prompt": [*PROMPTS, None]}), path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_each_format_gives_its_prompts(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert list(read_prompts(str(tmp_path / name))) == PROMPTS
    assert list(read_prompts(str(tmp_path / name), count=2)) == PROMPTS[:2]


def test_standard_input_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(PROMPTS).encode())))
    assert list(read_prompts("-")) == PROMPTS


def test_the_small_world_is_a_source_that_its_seed_decides() -> None:
    once = list(read_prompts("scenes", count=5, seed=3))
    assert len(once) == 5
    assert once == list(read_prompts("scenes", count=5, seed=3)) != list(read_prompts("scenes", count=5, seed=4))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "a.txt holds no prompts"),
        ("a.txt", b"\n  \n", "a.txt holds no prompts"),
        ("a.txt", "fine\nfine\nGrün\n".encode("latin-1"), "a.txt line 3 is not UTF-8"),
        ("a.csv", "text\nGrün\n".encode("latin-1"), "a.csv line 2 is not UTF-8"),
        ("a.csv", b"id,words\n1,a\n", "a.csv has no column prompt or caption or text, only id, words"),
        ("a.jsonl", b'"fine"\n{\n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b"3\n", "a.jsonl line 1 holds no text"),
        ("a.jsonl", b'{"words": "a"}\n', "a.jsonl has no column"),
        ("a.parquet", b"no such thing", "a.parquet cannot be read as Parquet"),
    ],
)
def test_a_source_that_is_not_prompts_is_refused(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=sentence):
        list(read_prompts(str(tmp_path / name)))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(PromptError, match=r"no prompt file nowhere.txt"):
        list(read_prompts("nowhere.txt"))
