"""Progress without a terminal: plain lines at intervals and at the end."""

import io
import re

from rich.console import Console

from distill.cli import console
from distill.cli.console import ImageLines


class Recorder:
    """A clock that the test sets, and the lines that were written."""

    def __init__(self, total: int | None) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.progress = ImageLines("distilling", total, self.lines.append, lambda: self.now)

    def at(self, now: float, seen: int, **metrics: float) -> None:
        self.now = now
        self.progress.update(seen, metrics)


def test_a_line_comes_every_half_minute_and_at_the_end() -> None:
    recorder = Recorder(20_000)
    recorder.at(100, 1000, gap=0.5)  # a resumed run; earlier images do not count for its speed
    recorder.at(120, 1200)
    assert recorder.lines == []
    recorder.at(131, 1310, gap=0.25)
    assert recorder.lines == ["distilling 1310/20000  10 images/s  0:31:09 left  gap 0.25"]
    recorder.progress.print("a note")
    recorder.at(150, 19_000)
    recorder.at(200, 20_000)
    assert recorder.lines[1:] == ["a note"]
    recorder.progress.end()
    assert recorder.lines[2:] == ["distilling 20000/20000  190 images/s  gap 0.25"]


def test_without_a_total_no_time_is_left_and_without_progress_nothing_is_written() -> None:
    recorder = Recorder(None)
    recorder.progress.end()
    assert recorder.lines == []
    recorder.at(10, 5)
    recorder.progress.advance(5)
    recorder.at(50, 50)
    recorder.progress.end()
    assert recorder.lines == ["distilling 50  1.12 images/s"]


def test_without_a_terminal_progress_is_lines(monkeypatch) -> None:
    page = Console(file=None, record=True, force_terminal=False, soft_wrap=True, stderr=True)
    monkeypatch.setattr(console, "_bars", page)
    with console.image_bar("prompts", 8) as bar:
        bar.update(8, {"truncated": 12345})
        bar.print("a [note]")
    assert page.export_text().splitlines() == ["a [note]", "prompts 8/8  truncated 12345"]


def test_a_table_that_is_too_wide_has_its_columns_as_rows(monkeypatch) -> None:
    """No name and no number is cut."""
    narrow = Console(width=60, record=True, file=io.StringIO())
    monkeypatch.setattr(console, "out", narrow)
    names = ["", *(f"metric_number_{i}" for i in range(9))]
    rows = [[f"model {i}", *(f"{i}.0123456{j}" for j in range(9))] for i in range(2)]
    narrow.print(console.metric_table("wide", names, rows))
    text = narrow.export_text()
    assert all(cell in text for cell in (*names, *rows[0], *rows[1]))
    assert len(text.splitlines()) == 1 + 3 + 9 + 1
    narrow.print(console.metric_table("narrow", names[:3], [row[:3] for row in rows]))
    assert len(narrow.export_text().splitlines()) == 1 + 3 + 2 + 1


def test_a_bar_fits_100_columns_and_says_what_goes_on(monkeypatch) -> None:
    page = Console(file=io.StringIO(), force_terminal=True, width=200, soft_wrap=True, color_system=None)
    monkeypatch.setattr(console, "_bars", page)
    with console.image_bar("teacher's images", 10_000_000) as bar:
        bar.update(9_999_999, dict.fromkeys(console.SHOWN, 0.123456))
        bar._progress.refresh()
        bar.show("sampling and evaluating")
    shown = page.file.getvalue().replace("\r", "\n").splitlines()
    assert any("9999999/10000000" in line and "gap 0.123" in line for line in shown)
    assert any("(sampling and evaluating)" in line for line in shown)
    assert max(len(re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", line).rstrip()) for line in shown) <= 100
