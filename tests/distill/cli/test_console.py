"""Progress where no terminal is: plain lines, now and then and at the end."""

from rich.console import Console

from distill.cli import console
from distill.cli.console import ImageLines


class Told:
    """A clock that is set, and the lines written."""

    def __init__(self, total: int | None) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.progress = ImageLines("distilling", total, 0, self.lines.append, lambda: self.now)

    def at(self, now: float, seen: int, **metrics: float) -> None:
        self.now = now
        self.progress.update(seen, metrics)


def test_a_line_comes_every_half_minute_and_at_the_end() -> None:
    told = Told(20_000)
    told.at(100, 1000, gap=0.5)  # a run that goes on; what another start did is no speed of this one
    told.at(120, 1200)
    assert told.lines == []
    told.at(131, 1310, gap=0.25)
    assert told.lines == ["distilling 1310/20000  10 images/s  0:31:09 left  gap 0.25"]
    told.progress.say("a note")
    told.at(150, 19_000)
    told.at(200, 20_000)
    assert told.lines[1:] == ["a note", "distilling 20000/20000  271 images/s  gap 0.25"]
    told.progress.end()
    assert told.lines[-1] == "distilling 20000/20000  190 images/s  gap 0.25"


def test_without_a_total_nothing_is_left_and_nothing_done_says_nothing() -> None:
    told = Told(None)
    told.progress.end()
    assert told.lines == []
    told.at(10, 5)
    told.progress.advance(5)
    told.at(50, 50)
    assert told.lines == ["distilling 50  1.12 images/s"]


def test_where_no_terminal_is_the_bar_is_lines(monkeypatch) -> None:
    page = Console(file=None, record=True, force_terminal=False, soft_wrap=True, stderr=True)
    monkeypatch.setattr(console, "_bars", page)
    with console.image_bar("prompts", 8) as bar:
        bar.update(8, {"truncated": 0})
        bar.say("a [note]")
    assert page.export_text().splitlines() == ["a [note]", "prompts 8/8  truncated 0"]
