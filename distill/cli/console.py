"""Output of the commands: progress and tables."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Table
from rich.text import Text

out = Console(soft_wrap=True)
_bars = Console(stderr=True, soft_wrap=True)  # standard output holds results only

# Metrics with progress; `kernel` and so on are of evaluations
SHOWN = ("gap", "flow_matching", "regression", "residual", "overall", "kernel", "frechet", "diversity", "clip_score")
_METRICS_WIDTH = 24  # characters of a bar that fits 100 columns
EVERY = 30.0  # seconds between two lines without a terminal


def quiet(silent: bool) -> None:
    """Suppress all output, as in all processes but the first."""
    out.quiet = _bars.quiet = silent


@contextmanager
def results_to(file: TextIO) -> Iterator[None]:
    """Print the results of commands to a file, without the terminal's colors, while the block lasts."""
    global out
    terminal, out = out, Console(file=file, soft_wrap=True)
    try:
        yield
    finally:
        out = terminal


@contextmanager
def image_bar(what: str, total: int | None, unit: str = "images") -> "Iterator[ImageBar | ImageLines]":
    """Show progress in images (or another `unit`), their speed and the remaining time; `total` None is unknown.

    On a terminal it is a bar; otherwise (nohup, container logs, schedulers) a line every EVERY seconds and at the end.
    """
    if not _bars.is_terminal:
        lines = ImageLines(what, total, note, time.monotonic, unit)
        yield lines
        lines.end()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        _Speed(unit),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[activity]}"),
        TextColumn("{task.fields[metrics]}"),
    )
    with Progress(*columns, console=_bars, speed_estimate_period=60) as progress:
        yield ImageBar(progress, progress.add_task(what, total=total, metrics="", activity=""))


def working(what: str) -> Status:
    """Show on a terminal that a step without a count is in progress, as a context manager."""
    return _bars.status(what)


def note(line: str) -> None:
    """Print a permanent line on standard error, as it is."""
    _bars.print(line, markup=False, highlight=False)


class _Speed(ProgressColumn):
    """Images, or another unit, per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} {self._unit}/s", style="progress.data.speed")


class ImageBar:
    """Progress of a command as a bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, seen: int, metrics: Mapping[str, float] | None = None, total: int | None = None) -> None:
        """Set the number of images done, the metrics shown and the total; None leaves them unchanged."""
        fields: dict[str, Any] = {"metrics": _fitting(metrics, _METRICS_WIDTH)} if metrics else {}
        fields["activity"] = ""
        self._progress.update(self._task, completed=seen, total=total, **fields)

    def advance(self, images: int) -> None:
        """Add to the number of images done."""
        self._progress.advance(self._task, images)

    def show(self, activity: str) -> None:
        """Show what the command does, until the next update."""
        self._progress.update(self._task, activity=f"({activity})", metrics="")
        self._progress.refresh()

    def print(self, line: str) -> None:
        """Print a permanent line, above the bar."""
        note(line)


class ImageLines:
    """Progress as lines of text, with the speed since the previous line; `clock` returns seconds.

    Speed counts from the first update, because earlier images belong to an earlier start of the run.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        write: Callable[[str], None],
        clock: Callable[[], float],
        unit: str = "images",
    ) -> None:
        self._what, self._total, self._seen, self._unit = what, total, 0, unit
        self._clock, self.print = clock, write
        self._metrics = ""
        self._start: tuple[float, int] | None = None
        self._shown = (clock(), 0)

    def update(self, seen: int, metrics: Mapping[str, float] | None = None, total: int | None = None) -> None:
        """As for a bar; also write a line if it is time."""
        self._seen = seen
        self._total = self._total if total is None else total
        self._metrics = _format(metrics) if metrics else self._metrics
        if self._start is None:
            self._start = self._shown = (self._clock(), seen)
        elif self._clock() - self._shown[0] >= EVERY and seen != self._total:  # `end` writes the last line
            self._write_line(self._shown)

    def advance(self, images: int) -> None:
        """Add to the number of images done."""
        self.update(self._seen + images)

    def show(self, activity: str) -> None:
        """Do nothing: a line is written at the next progress."""

    def end(self) -> None:
        """Write the last line, with the overall speed, if there was progress that no line shows."""
        if self._start is not None and (self._seen != self._shown[1] or self._shown is self._start):
            self._write_line(self._start)

    def _write_line(self, since: tuple[float, int]) -> None:
        now, images = self._clock(), self._seen - since[1]
        parts = [f"{self._what} {self._seen}" + ("" if self._total is None else f"/{self._total}")]
        if images > 0 and now > since[0]:
            speed = images / (now - since[0])
            parts.append(f"{speed:.3g} {self._unit}/s")
            if self._total is not None and self._seen < self._total:
                parts.append(f"{timedelta(seconds=round((self._total - self._seen) / speed))} left")
        self.print("  ".join([*parts, self._metrics]).rstrip())
        self._shown = (now, self._seen)


def _format(metrics: Mapping[str, float]) -> str:
    shown = {name: f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}" for name, value in metrics.items()}
    return "  ".join(f"{name} {text}" for name, text in shown.items())


def _fitting(metrics: Mapping[str, float], width: int) -> str:
    """Format the first metrics, as many as fit `width` characters, and at least one."""
    count = next((n for n in range(len(metrics), 1, -1) if len(_format(dict(list(metrics.items())[:n]))) <= width), 1)
    return _format(dict(list(metrics.items())[:count]))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Build a table with the first column aligned left and the others right.

    Where the console is too narrow, texts are folded; a first column of short names stays whole.
    """
    built = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        built.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    built.columns[0].no_wrap = max(len(row[0]) for row in (header, *rows)) <= out.width // 3
    for row in rows:
        built.add_row(*row)
    return built


def metric_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Build a table of one model per row, or, if that is wider than the console and narrower, one metric per row."""
    lines = [*zip(header, *rows, strict=True)]
    plain, turned = table(title, header, rows), table(title, lines[0], lines[1:])
    wide, narrow = (
        Measurement.get(out, out.options.update(max_width=10_000), each).maximum for each in (plain, turned)
    )
    return plain if wide <= max(out.width, narrow) else turned
