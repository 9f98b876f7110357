"""Every kind of source gives the same prompts; what is not one is refused by its file, and line where it has one."""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import PromptError
from distill.prompts import Distinct, Spread, prompt_stats, read_prompts

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
        case "":
            save_to_disk(path, [[PROMPTS[0], None], PROMPTS[1:]])


def save_to_disk(folder: Path, parts: list[list[str | None]]) -> None:
    """What `datasets.Dataset.save_to_disk` writes: Arrow streams, and the state that names them in order."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, texts in zip(names, parts, strict=True):
        table = pa.table({"id": list(range(len(texts))), "caption": pa.array(texts, pa.string())})
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "saved"])
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
        ("a.jsonl", b'"fine"\n"\\ud83d"\n', "a.jsonl line 2 holds a half of a character"),
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


def test_a_folder_that_is_no_saved_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"without state\.json"):
        list(read_prompts(str(tmp_path)))
    save_to_disk(tmp_path / "both" / "train", [["a"]])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(PromptError, match=r"both holds splits \(train\); give the folder of one"):
        list(read_prompts(str(tmp_path / "both")))
    assert list(read_prompts(str(tmp_path / "both" / "train"))) == ["a"]
    state = tmp_path / "both" / "train" / "state.json"
    for damaged in ("{", "[]", '{"_data_files": [3]}'):
        state.write_text(damaged)
        with pytest.raises(PromptError, match=r"state.json is damaged"):
            list(read_prompts(str(state.parent)))


def test_a_data_set_cut_off_is_refused_by_its_file(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "cut", [["a circle " * 100] * 100])
    part = tmp_path / "cut" / "data-00000-of-00001.arrow"
    part.write_bytes(part.read_bytes()[:5000])
    with pytest.raises(PromptError, match=r"data-00000-of-00001.arrow cannot be read as Arrow"):
        list(read_prompts(str(tmp_path / "cut")))
    part.unlink()
    with pytest.raises(PromptError, match=r"data-00000-of-00001.arrow cannot be read as Arrow"):
        list(read_prompts(str(tmp_path / "cut")))


def test_each_different_prompt_comes_once_and_a_beginning_is_known_again() -> None:
    whole, skipped = Distinct(["a", "b", "a", "c", "b"]), Distinct(["a", "b", "a", "d", "b"])
    assert list(whole) == ["a", "b", "c"]
    assert (whole.read, whole.repeated) == (5, 2)
    skipped.skip(3)
    beginning = Distinct(["a", "b", "a"])
    beginning.skip(9)
    assert (skipped.read, skipped.sha256) == (beginning.read, beginning.sha256) == (3, beginning.sha256)
    assert list(skipped) == ["d"]
    assert skipped.sha256 != whole.sha256


def test_a_source_is_counted_with_its_repetitions_and_gaps(tmp_path: Path) -> None:
    lengths = [*range(1, 41)]  # of 40 different prompts, the 20th and the 38th are the median and the 95th percentile
    lines = ["x" * length for length in lengths] + ["xx", "", "  ", "xxx"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    found = prompt_stats(str(tmp_path / "a.txt"))
    assert (found.prompts, found.repeated, found.empty) == (42, 2, 2)
    assert found.lengths == {"characters": Spread(1, 20, 38, 40, None, 0)}
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(lines))
    assert prompt_stats(str(tmp_path / "a.csv")) == found
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(PromptError, match=r"empty.txt holds no prompts"):
        prompt_stats(str(tmp_path / "empty.txt"))


def test_tokens_are_counted_as_the_teacher_sees_them(teacher_t5: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("a\na red circle\n" + "a " * 6 + "\n" + "a " * 7)
    found = prompt_stats(str(source), teacher_t5)
    # CLIP has start and end and 8 tokens of room; T5 has only the end, and 6.
    assert found.lengths["tokenizer"] == found.lengths["tokenizer_2"] == Spread(3, 5, 9, 9, 8, 1)
    assert found.lengths["tokenizer_3"] == Spread(2, 4, 8, 8, 6, 2)
    result = CliRunner().invoke(app, ["prompts", "stats", str(source), "--teacher", str(teacher_t5)])
    assert result.exit_code == 0
    assert "4 prompts, 4 different, 0 repeated; 0 empty lines passed over." in result.output
    assert "2 over 6" in result.output
