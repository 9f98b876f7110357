"""What the commands print: one progress bar and one table, alike everywhere."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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
_bars = Console(stderr=True)  # standard output holds results alone


def quiet(silent: bool) -> None:
    """Print nothing, as all processes but the first do."""
    out.quiet = _bars.quiet = silent


class _Rate(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} images/s", style="progress.data.speed")


@contextmanager
def image_bar(what: str, total: int | None, seen: int = 0) -> Iterator["ImageBar"]:
    """A bar over images seen, with images/s and the time left; no `total` when it is unknown."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=_bars, speed_estimate_period=60) as progress:
        yield ImageBar(progress, progress.add_task(what, total=total, completed=seen, figures=""))


class ImageBar:
    """Handle of a running bar."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = progress.task_ids[task]

    def update(self, seen: int, figures: Mapping[str, float] | None = None) -> None:
        """Move to `seen` images; figures, when given, stand behind the bar."""
        self._progress.update(self._task, completed=seen)
        if figures:
            text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
            self._progress.update(self._task, figures=text)

    def advance(self, images: int) -> None:
        """Move on by `images`."""
        self._progress.advance(self._task, images)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """First column left, the others right."""
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        made.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made
