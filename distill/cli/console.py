"""What the commands print: one progress bar and one table, alike everywhere."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

out = Console(soft_wrap=True)
_bars = Console(stderr=True, soft_wrap=True)  # standard output holds results alone

SHOWN = ("gap", "flow_matching", "regression", "residual", "overall", "frechet", "diversity")  # metrics beside a bar
EVERY = 30.0  # seconds between two lines where there is no terminal


def quiet(silent: bool) -> None:
    """Print nothing, as all processes but the first do."""
    out.quiet = _bars.quiet = silent


class ImageProgress(Protocol):
    """How a command tells how far it is."""

    def update(self, seen: int, metrics: Mapping[str, float] | None = None, total: int | None = None) -> None:
        """It is at `seen` images; metrics, when given, stand beside it; a `total` that was unknown is known now."""

    def advance(self, images: int) -> None:
        """It is `images` further."""

    def say(self, note: str) -> None:
        """A sentence that stays."""


@contextmanager
def image_bar(what: str, total: int | None, seen: int = 0) -> Iterator[ImageProgress]:
    """Progress over images seen, with images/s and the time left; no `total` when it is unknown.

    A bar on a terminal; elsewhere (nohup, container logs, schedulers) a line every EVERY seconds and one at the end.
    """
    if not _bars.is_terminal:
        lines = ImageLines(what, total, seen, _plain, time.monotonic)
        yield lines
        lines.end()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    with Progress(*columns, console=_bars, speed_estimate_period=60) as progress:
        yield _ImageBar(progress, progress.add_task(what, total=total, completed=seen, metrics=""))


def _plain(line: str) -> None:
    _bars.print(line, markup=False, highlight=False)


class _Rate(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} images/s", style="progress.data.speed")


class _ImageBar:
    """A running bar."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = progress.task_ids[task]

    def update(self, seen: int, metrics: Mapping[str, float] | None = None, total: int | None = None) -> None:
        self._progress.update(self._task, completed=seen, total=total)
        if metrics:
            self._progress.update(self._task, metrics=_words(metrics))

    def advance(self, images: int) -> None:
        self._progress.advance(self._task, images)

    def say(self, note: str) -> None:
        _plain(note)  # rich puts it above the bar


class ImageLines:
    """Progress as lines of text, with the speed since the line before; `clock` counts seconds.

    Where it stands when it first hears of images is where it begins: what came before was another start's.
    """

    def __init__(
        self, what: str, total: int | None, seen: int, write: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self._what, self._total, self._seen = what, total, seen
        self._write, self._clock = write, clock
        self._metrics = ""
        self._begun: tuple[float, int] | None = None
        self._shown = (clock(), seen)

    def update(self, seen: int, metrics: Mapping[str, float] | None = None, total: int | None = None) -> None:
        self._seen = seen
        self._total = self._total if total is None else total
        if metrics:
            self._metrics = _words(metrics)
        if self._begun is None:
            self._begun = self._shown = (self._clock(), seen)
        elif self._clock() - self._shown[0] >= EVERY:
            self._line(self._shown)

    def advance(self, images: int) -> None:
        self.update(self._seen + images)

    def say(self, note: str) -> None:
        self._write(note)

    def end(self) -> None:
        """The last line, with the speed over all; none where nothing was done."""
        if self._begun is not None:
            self._line(self._begun)

    def _line(self, since: tuple[float, int]) -> None:
        now, images = self._clock(), self._seen - since[1]
        parts = [f"{self._what} {self._seen}" + ("" if self._total is None else f"/{self._total}")]
        if images > 0 and now > since[0]:
            speed = images / (now - since[0])
            parts.append(f"{speed:.3g} images/s")
            if self._total is not None and self._seen < self._total:
                parts.append(f"{_clock_face((self._total - self._seen) / speed)} left")
        self._write("  ".join([*parts, self._metrics]).rstrip())
        self._shown = (now, self._seen)


def _words(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())


def _clock_face(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """First column left, the others right."""
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        made.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made
