"""Counts and lengths of the prompts of a source."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from distill.cli import app
from distill.data.prompt_stats import LengthStats, prompt_stats
from distill.errors import PromptError
from distill.models.sd3_folder import SD3Folder


def test_a_source_is_counted_with_its_repetitions_and_gaps(tmp_path: Path) -> None:
    lengths = [*range(1, 41)]  # of 40 different prompts, the 20th and the 38th are the median and the 95th percentile
    lines = ["x" * length for length in lengths] + ["xx", "", "  ", "xxx"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    found = prompt_stats(str(tmp_path / "a.txt"))
    assert (found.prompts, found.repeated, found.empty) == (42, 2, 2)
    assert found.lengths == {"characters": LengthStats(1, 20, 38, 40, None, 0)}
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(lines))
    assert prompt_stats(str(tmp_path / "a.csv")) == found
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(PromptError, match=r"empty.txt holds no prompts"):
        prompt_stats(str(tmp_path / "empty.txt"))


def test_tokens_are_counted_as_the_teacher_sees_them(teacher_t5: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("a\na red circle\n" + "a " * 6 + "\n" + "a " * 7)
    found = prompt_stats(str(source), SD3Folder.read(teacher_t5))
    # CLIP has start and end and 8 tokens of room; T5 has only the end, and 6.
    assert found.lengths["tokenizer"] == found.lengths["tokenizer_2"] == LengthStats(3, 5, 9, 9, 8, 1)
    assert found.lengths["tokenizer_3"] == LengthStats(2, 4, 8, 8, 6, 2)
    result = CliRunner().invoke(app, ["prompts", "stats", str(source), "--teacher", str(teacher_t5)])
    assert result.exit_code == 0
    assert "4 prompts, 4 distinct, 0 repeated; 0 empty lines skipped." in result.output
    assert "2 over 6" in result.output
