"""Every kind of source gives the same prompts; others are refused, with the file and the line."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from distill.cli import app
from distill.data.prompt_files import FORMATS
from distill.data.prompts import read_prompts
from distill.errors import PromptError
from service.jobs.fine_tuning.job_folder import READABLE

PROMPTS = ["a red circle", "a blue, “odd” square", "zwölf Kreise"]


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": pa.Codec("zstd").compress}


def write(path: Path) -> None:
    """Write the prompts in the format of the file's name."""
    match path.suffix.lower():
        case packed if packed in COMPRESS:
            write(path.with_suffix(""))
            path.write_bytes(bytes(COMPRESS[packed](path.with_suffix("").read_bytes())))
        case ".txt":
            path.write_bytes(("\ufeff" + "\r\n\n".join(PROMPTS)).encode())
        case ".json":
            rows = [PROMPTS[0], {"Caption": None, "text": PROMPTS[1]}, None, {"prompt": [PROMPTS[2], "another"]}]
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        case ".tsv":
            path.write_text("id\ttext\n" + "".join(f"{i}\t{p}\n" for i, p in enumerate(PROMPTS)), encoding="utf-8")
        case ".jsonl" | ".ndjson":
            rows = [json.dumps(PROMPTS[0]), json.dumps({"id": 1, "caption": PROMPTS[1]}), ""]
            path.write_text("\n".join([*rows, json.dumps({"prompt": PROMPTS[2]})]), encoding="utf-8")
        case ".csv":
            path.write_text("id,text\n" + "".join(f'{i},"{p}"\n' for i, p in enumerate(PROMPTS)), encoding="utf-8")
        case ".parquet":
            pq.write_table(pa.table({"id": [0, 1, 2, 3], "prompt": [*PROMPTS, None]}), path)
        case "":
            save_to_disk(path, [[PROMPTS[0], None], PROMPTS[1:]])


def save_to_disk(folder: Path, parts: list[list[str | None]]) -> None:
    """Write what `datasets.Dataset.save_to_disk` does: Arrow streams, and the state that names them in order."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, texts in zip(names, parts, strict=True):
        table = pa.table({"id": list(range(len(texts))), "caption": pa.array(texts, pa.string())})
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        "a.TXT",
        "a.jsonl",
        "a.ndjson",
        "a.json",
        "a.CSV",
        "a.csv",
        "a.tsv",
        "a.Parquet",
        "saved",
        "a.txt.gz",
        "a.csv.GZ",
        "a.json.bz2",
        "a.tsv.xz",
        "a.jsonl.zst",
    ],
)
def test_each_format_gives_its_prompts(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert list(read_prompts(str(tmp_path / name))) == PROMPTS
    assert list(read_prompts(str(tmp_path / name), count=2)) == PROMPTS[:2]


def test_standard_input_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(PROMPTS).encode())))
    assert list(read_prompts("-")) == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "a.txt holds no prompts"),
        ("a.txt", b"\n  \n", "a.txt holds no prompts"),
        ("a.txt", "fine\nfine\nGrün\n".encode("latin-1"), "a.txt line 3 is not UTF-8"),
        ("a.csv", "text\nGrün\n".encode("latin-1"), "a.csv line 2 is not UTF-8"),
        ("a.csv", b"id,words\n1,a\n", "a.csv has no column prompt or caption or text, only id, words; name the column"),
        ("a.csv", b"prompt\nfine\na red circle, left of it\n", "a.csv line 3 has 2 fields, and its header has 1"),
        ("a.csv", b'id,text\n1,"two\nlines"\n2\n', "a.csv line 4 has 1 fields, and its header has 2"),
        ("a.csv", b'text\nfine\n"open\nfine\nfine\n', "a.csv line 3 is not CSV"),
        ("a.csv", b"Text,TEXT\na,b\n", "a.csv has 2 columns called 'text'"),
        ("a.tsv", b"text\nfine\na\tb\n", "a.tsv line 3 has 2 fields"),
        ("a.yaml", b"fine", r"a.yaml ends in .yaml, which is no known format"),
        ("a.xlsx", b"PK", r"a.xlsx ends in .xlsx"),
        ("a.txt.zip", b"PK", r"a.txt.zip ends in .zip"),
        ("a.parquet.gz", b"", "a.parquet.gz is compressed, which is not supported for Parquet"),
        ("a.txt.gz", b"fine", r"a.txt.gz cannot be read as txt.gz"),
        ("a.csv.gz", gzip.compress(b"text\nfine" * 99, mtime=0)[:-9], r"a.csv.gz cannot be read as csv.gz"),
        ("a.txt.xz", b"fine", r"a.txt.xz cannot be read as txt.xz"),
        ("a.txt.bz2", bz2.compress(b"fine")[:-1], r"a.txt.bz2 cannot be read as txt.bz2"),
        ("a.txt.zst", b"fine", r"a.txt.zst cannot be read as txt.zst"),
        ("a.txt", "fine".encode("utf-16-le"), "a.txt line 1 is not UTF-8"),
        ("a.json", b'["fine", 3]', "a.json item 2 holds no text but a number"),
        ("a.json", b'["fine"', "a.json is not JSON"),
        ("a.json", b"[" * 100_000, "a.json is not JSON"),
        ("a.json", b'{"prompt": ["a", "b"]}', "a.json holds an object, not an array"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b'["a", "b"]', "a.jsonl line 1 holds no text but a list"),
        ("a.jsonl", b'{"prompt": 3}\n', "a.jsonl line 1 holds a number as 'prompt', not text"),
        ("a.jsonl", b'{"prompt": [3]}\n', "a.jsonl line 1 holds a number as 'prompt', not text"),
        ("a.jsonl", b'{"prompt": {"a": 1}}\n', "a.jsonl line 1 holds an object as 'prompt', not text"),
        ("a.jsonl", b'"fine"\n{\n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'"fine"\n' + b"[" * 100_000, "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"prompt":' * 100_000, "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b"3\n", "a.jsonl line 1 holds no text"),
        ("a.jsonl", b'{"words": "a"}\n', "a.jsonl line 1 has no column"),
        ("a.jsonl", b'"fine"\n"\\ud83d"\n', "a.jsonl line 2 holds a half of a character"),
        ("a.parquet", b"no such thing", "a.parquet cannot be read as Parquet"),
    ],
)
def test_a_source_that_is_not_prompts_is_refused(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=sentence):
        list(read_prompts(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "Prompt,caption\n,a\nb,c\n"),
        ("a.csv", "id, TEXT\n1,a\n\n2,b\n"),
        ("a.csv", "text,Text\na,c\nb,d\n"),  # the exact name comes first
        ("a.jsonl", '{"prompt": null, "caption": "a"}\n{"prompt": " ", "text": ["b", "c"]}\n{"prompt": null}\n'),
        ("a.jsonl", '{"prompt": [], "text": "a"}\n{"prompt": [null, "b"]}\n'),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n'),  # as `datasets` writes it
        ("a.txt", "a\rb\r"),
        ("a", "a\nb\n"),
    ],
)
def test_a_prompt_is_the_first_text_of_the_known_columns(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert list(read_prompts(str(tmp_path / name))) == ["a", "b"]


def test_a_column_is_named_where_it_is_another(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Words,text\na,x\nb,y\n")
    pq.write_table(pa.table({"Words": ["a", "b"], "text": ["x", "y"]}), tmp_path / "a.parquet")
    for source in (str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")):
        assert list(read_prompts(source, column="words")) == ["a", "b"]
        with pytest.raises(PromptError, match="has no column word, only Words, text"):
            list(read_prompts(source, column="word"))
        shown = CliRunner().invoke(app, ["prompts", "stats", source, "--column", "Words"])
        assert "2 prompts, 2 distinct" in shown.output
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(PromptError, match=r"a.txt is plain text, which has no column 'words'"):
        list(read_prompts(str(tmp_path / "a.txt"), column="words"))


def test_tables_of_other_types_are_read_or_refused_by_their_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array(["a", None, "b"])
    for readable in (
        texts.cast(pa.large_string()),
        texts.cast(pa.binary()),
        texts.dictionary_encode(),
        pa.array([["a", "x"], None, ["b"]]),
    ):
        pq.write_table(pa.table({"prompt": readable}), path)
        assert list(read_prompts(str(path))) == ["a", "b"]
    pq.write_table(pa.table({"prompt": [None, None, "b"], "caption": ["a", None, "c"]}), path)
    assert list(read_prompts(str(path))) == ["a", "b"]
    for number in (pa.array([1, 2]), pa.array([1.5]), pa.array([True]), pa.array([[1], [2]])):
        pq.write_table(pa.table({"id": number, "caption": number}), path)
        with pytest.raises(PromptError, match=r"a.parquet row 1 holds a .* as 'caption', not text"):
            list(read_prompts(str(path)))
    pq.write_table(pa.table({"prompt": pa.array([b"Gr\xfcn"])}), path)
    with pytest.raises(PromptError, match=r"a.parquet cannot be read as Parquet"):
        list(read_prompts(str(path)))


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number, prompt in enumerate(PROMPTS):
        pq.write_table(pa.table({"prompt": [prompt]}), tmp_path / f"train-{number}.parquet")
    (tmp_path / "README.md").write_text("What this is.")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "._train-0.parquet").write_bytes(b"what macOS leaves")
    assert list(read_prompts(str(tmp_path))) == PROMPTS
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(PromptError, match=r"holds files of several formats \(.txt, .json\); give one of the files"):
        list(read_prompts(str(tmp_path)))


def test_a_pipe_is_read_as_text() -> None:
    reader, writer = os.pipe()
    os.write(writer, "\n".join(PROMPTS).encode())
    os.close(writer)
    assert list(read_prompts(f"/dev/fd/{reader}")) == PROMPTS
    os.close(reader)


def test_jobs_take_the_same_formats() -> None:
    assert set(READABLE) == set(FORMATS)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(PromptError, match=r"no prompt file nowhere.txt"):
        list(read_prompts("nowhere.txt"))


def test_a_folder_that_is_no_saved_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"holds no prompt files and, without state\.json, is no saved data set"):
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
