"""Line charts of metrics over training samples, as coordinates that the page's template draws as SVG."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from distill.report.run_folder import TIME_BUCKETS
from distill.report.units import si

DOTTED = 16  # a curve of at most so many points has a dot on each
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 56, WIDTH - 14, 10, HEIGHT - 38  # of the plot

Curve = list[tuple[float, float]]  # training samples and value
Tick = tuple[float, str]  # coordinate and label


@dataclass(frozen=True)
class Panel:
    """Title, unit and explanation of a chart."""

    title: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A curve of a chart: its SVG path, the dots on it, and its first and last values as text."""

    label: str
    color: str
    path: str
    dots: list[tuple[float, float]]
    first: str
    last: str


@dataclass(frozen=True)
class Strip:
    """The area around a logged point at `x`, whose tooltip shows the values of all curves."""

    x: float
    left: float
    width: float
    tooltip: str


@dataclass(frozen=True)
class Chart:
    """Everything that the template draws of a chart."""

    panel: Panel
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    strips: list[Strip]
    teacher: Tick | None  # vertical coordinate and value of the teacher's metric
    description: str  # for screen readers


def chart(
    panel: Panel, curves: Mapping[str, Curve], span: tuple[float, float] | None = None, teacher: float | None = None
) -> Chart:
    """Lay out a chart; the vertical axis includes at least `span`, and the `teacher`'s value, which is drawn."""
    curves = _by_time(curves)
    xs = sorted({x for curve in curves.values() for x, _ in curve})
    ys = [y for curve in curves.values() for _, y in curve]
    ys += [*(span or ()), *([] if teacher is None else [teacher])]
    low, high = min(ys), max(ys)
    if 0 < low < high / 2:  # zero is close enough to be shown
        low = 0.0
    y_values, x_values = _ticks(low, high, 4), _ticks(0, xs[-1], 4)
    low, high, end = y_values[0], y_values[-1], max(x_values[-1], xs[-1])
    digits = max(3, math.ceil(math.log10(max(-low, high) / (y_values[1] - low))) + 1)  # so that all labels differ

    def across(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * x / end, 1)

    def up(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low), 1)

    styles = _styles(list(curves))
    lines = []
    for name, curve in curves.items():
        label, color = styles[name] if len(curves) > 1 else ("", styles[name][1])
        points = [(across(x), up(y)) for x, y in curve]
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        dots = points if len(points) <= DOTTED else points[-1:]
        lines.append(Line(label, color, path, dots, si(curve[0][1]), si(curve[-1][1])))

    values = {name: dict(curve) for name, curve in curves.items()}
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(xs)), xs[-1]]
    strips = []
    for x, (start, stop) in zip(xs, pairwise(edges), strict=True):
        found = [f"{styles[name][0]}: {si(points[x])}" for name, points in values.items() if x in points]
        tooltip = "\n".join([f"{si(x)} images", *found])
        strips.append(Strip(across(x), across(start), round(across(stop) - across(start), 1), tooltip))

    ranges = "; ".join(f"{line.label} from {line.first} to {line.last}".strip() for line in lines)
    mark = None if teacher is None else (up(teacher), si(teacher))
    return Chart(
        panel,
        [(across(x), si(x)) for x in x_values],
        [(up(y), si(y, digits=digits)) for y in y_values],
        lines,
        strips,
        mark,
        f"{panel.title} over {si(xs[-1])} training samples: {ranges}" + (f"; teacher {mark[1]}" if mark else ""),
    )


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Label and CSS color of each curve: ranges on a ramp for time buckets `t0.2`, `t0.4`, else names."""
    if all(map(_is_bucket, names)):
        starts = {name: float(name[1:]) for name in names}
        return {
            name: (
                f"t {start:.1f}–{start + 1 / TIME_BUCKETS:.1f}",
                f"color-mix(in oklab, var(--late) {100 * start / (1 - 1 / TIME_BUCKETS):.0f}%, var(--early))",
            )
            for name, start in starts.items()
        }
    roles = {"student": 0, "fake": 1}
    return {name: (name.replace("_", " "), f"var(--c{roles.get(name, i)})") for i, name in enumerate(names)}


def _by_time(curves: Mapping[str, Curve]) -> Mapping[str, Curve]:
    """Curves of time buckets in the order of time. A log has them in the order in which they first had samples."""
    return dict(sorted(curves.items())) if all(map(_is_bucket, curves)) else curves


def _is_bucket(name: str) -> bool:
    return re.fullmatch(r"t\d\.\d", name) is not None


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` + 1 round numbers that enclose [low, high], in steps of 1, 2 or 5 times a power of ten."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - abs(low) / 2, high + (abs(high) / 2 or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]
