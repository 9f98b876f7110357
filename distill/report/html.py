"""A run as one HTML file that needs nothing beside it: curves as inline SVG, pictures as data URIs, no scripts.

Everything that comes out of the run folder is escaped where it enters the page. torch is not imported.
"""

import base64
import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from distill.errors import RunError
from distill.files import MARK, atomic_write_text, check_replaceable
from distill.report.alarms import Metrics
from distill.report.run_folder import Clock, RunFolder, read_clock

POINTS = 200  # of one curve at most; longer logs are averaged
GRIDS = 12  # sample grids at most, first and last among them
DOTTED = 16  # points up to which each is marked
CURVES = 6  # in one chart at most; more of a kind get a chart each

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """What a reader should know of a chart."""

    title: str
    unit: str = ""
    note: str = ""


# Series `a/b` are curves `b` of chart `a`, unless `a/b` stands here itself.
_SECTIONS = {
    "Distillation": {
        "gap": Panel("Gap", "|u − v|²", "Teacher's velocity u against the fake's v on the student's images."),
        "log10_gap": Panel("Gap by time", "log₁₀ |u − v|²", "t = 0 is the image, t = 1 is noise."),
        "loss": Panel("Losses", "", "They swing round zero or drift with the student, and say little alone."),
        "flow_matching": Panel("Fake's error", "|v − w|²", "How well the fake knows what the student makes."),
        "log10_flow_matching": Panel("Fake's error by time", "log₁₀ |v − w|²"),
        "regression": Panel("Regression", "|v − (z − x₀)|²", "The student against the teacher's pairs."),
        "log10_regression": Panel("Regression by time", "log₁₀ |v − (z − x₀)|²"),
        "residual": Panel("Residual", "", "How far the student is from being the teacher's flow map, squared."),
        "log10_residual": Panel("Residual by time", "log₁₀", "t is where jumps start; 1 is noise."),
        "gradient_norm": Panel("Gradient norms", "before clipping"),
        "update_ratio": Panel("Update ratios", "|update| / |weights|", "Of one round, on the lines of the log."),
        "skipped": Panel("Skipped steps", "share", "Steps whose gradient was not finite."),
    },
    "The student's latents": {
        "latent/std": Panel("Standard deviation", "", "1 for the autoencoder's latents of real images."),
        "latent/diversity": Panel("Diversity", "RMS distance in a batch", "A fall to nothing is mode collapse."),
        "latent/saturated": Panel("Saturated", "share beyond ±3"),
    },
    "Cost": {
        "images_per_second": Panel("Speed", "images/s", "Grids, judgments and checkpoints included."),
        "seconds": Panel("Time", "s"),
        "memory": Panel("Memory", "B", "Of the GPU, or of the process where there is none."),
    },
}
_JUDGED = {
    "overall": Panel("Overall score", "share correct", "Higher is better."),
    "frechet": Panel("Fréchet distance", "", "Lower is better."),
    "diversity": Panel("Diversity", "", "Higher is better."),
}


def write_report(run: RunFolder, out: Path) -> None:
    """Write the page of a run, completely or not at all.

    Raises RunError if a file of the run has another format, and OutputError if `out` is a file but not a report.
    """
    check_replaceable(out)
    atomic_write_text(out, render_report(run))


def render_report(run: RunFolder) -> str:
    """The page of a run as text."""
    clock = read_clock(run.folder)
    # What the log itself says of speed is the better known.
    rows = [{**_speed(clock, row), **row} for row in run.metrics]
    method = run.config.get("method")
    name = method.get("name", "") if isinstance(method, dict) else ""
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
    template = Template((Path(__file__).with_name("report.html")).read_text(encoding="utf-8"))
    return template.substitute(
        generator=MARK,
        name=escape(run.name),
        state=run.state,
        state_class=run.state.split()[0],
        line=escape(f"One-step student of {run.config['teacher']} by {name or 'distillation'}; last change {changed}."),
        percent=f"{min(100, 100 * run.images / max(run.budget, 1)):.1f}",
        tiles="".join(_tiles(run, clock)),
        body="\n".join(
            [*_alarms(run), *_judged(run), *_against_teacher(run), *_samples(run), *_curves(rows), *_config(run)]
        ),
        footer=f"Made by <code>distill report</code> on {time.strftime('%Y-%m-%d %H:%M')}. "
        "Point at a curve for its figures. Time t and velocities follow rectified flow.",
    )


def si(value: float, unit: str = "", digits: int = 3) -> str:
    """Three digits, or more, with an SI prefix from a thousand on: `38.4 k`, `1.2 MB`."""
    size = abs(value)
    power = min(int(math.log10(size) / 3 + 1e-9), 4) if size >= 1 else 0
    if power < 4 and float(f"{size / 1000**power:.{digits}g}") >= 1000:
        power += 1
    suffix = ("", "k", "M", "G", "T")[power] + unit
    return f"{value / 1000**power:.{digits}g}".replace("-", "−") + (f" {suffix}" if suffix else "")


def duration(seconds: float) -> str:
    """`42 s`, `11 min 22 s`, `3 h 05 min`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if minutes else f"{s} s"


def _speed(clock: Clock, row: Metrics) -> Metrics:
    speed = clock.speeds.get(int(row["images"]))
    return {} if speed is None else {"images_per_second": speed}


def _tiles(run: RunFolder, clock: Clock) -> Iterator[str]:
    """The figures that a reader asks for first."""

    def tile(figure: str, what: str) -> str:
        return f'<div class="tile"><b>{figure}</b><span>{escape(what)}</span></div>'

    yield tile(si(run.images), f"images seen of {si(run.budget)}")
    where = f"best student, at {si(run.best['images'])}" if "images" in run.best else "best student"
    for name in ("overall", "frechet", "diversity"):
        if name in run.best:
            yield tile(si(run.best[name]), f"{_JUDGED[name].title}, {where}")
    if clock.seconds:
        yield tile(duration(clock.seconds), "of wall time in all")
    if clock.speeds:
        speeds = sorted(clock.speeds.values())
        yield tile(si(speeds[len(speeds) // 2]), "images/s, median")
    peak = max((row.get("memory/peak", 0) for row in run.metrics), default=0)
    if peak:
        yield tile(si(peak, "B"), "of memory at the heaviest moment")
    size = sum(path.stat().st_size for path in (run.folder / "student").rglob("*") if path.is_file())
    if size:
        yield tile(si(size, "B"), "student's folder on disk")


def _alarms(run: RunFolder) -> Iterator[str]:
    """What went wrong, first of all."""
    if run.alarms:
        yield _heading("Alarms", "Each is raised once, when its rule first holds.")
        lines = [f"<li>After {si(alarm.images)} images: {escape(alarm.says)}.</li>" for alarm in run.alarms]
        yield f'<ul class="alarms">{"".join(lines)}</ul>'


def _judged(run: RunFolder) -> Iterator[str]:
    """The evaluation history: charts, and the figures themselves."""
    if not run.evaluations:
        return
    names = _names(run.evaluations)
    tasks = [name for name in names if name not in _JUDGED]
    highest = max((row[name] for row in run.evaluations for name in tasks if name in row), default=0.0)
    charts = [
        _chart(panel, {name: _curve(run.evaluations, name)}) for name, panel in _JUDGED.items() if name in names
    ]  # the tasks share a scale, so that they compare
    charts += [
        _chart(Panel(task.replace("_", " "), "share correct"), {task: _curve(run.evaluations, task)}, (0.0, highest))
        for task in tasks
    ]
    yield _heading("Evaluations", "The averaged student on the same prompts and seeds each time, over images seen.")
    yield f'<div class="panels">{"".join(charts)}</div>'
    yield _metrics_table(run.evaluations, names, run.best.get("images"))


def _against_teacher(run: RunFolder) -> Iterator[str]:
    """What `distill evaluate` left in the run folder, or how to have it."""
    yield _heading("Teacher against student")
    figures, text = run.folder / "evaluation.json", run.folder / "evaluation.txt"
    picture = run.folder / "teacher-vs-student.png"
    if figures.exists():
        yield _comparison(figures)
    elif text.exists():
        yield f'<div class="table"><pre>{escape(text.read_text(encoding="utf-8").strip())}</pre></div>'
    if picture.exists():
        yield _picture(picture, "Images of teacher and student for the same prompts, which stand under them", wide=True)
    if not (figures.exists() or text.exists() or picture.exists()):
        arguments = ["distill", "evaluate", "--student", str(run.folder / "student"), "--picture", str(picture)]
        command = f"{shlex.join(arguments)} --json > {shlex.quote(str(figures))}"
        yield f'<p class="soft">They were not compared yet. For the shipped teacher: <code>{escape(command)}</code></p>'


def _comparison(path: Path) -> str:
    """The two judgments that `distill evaluate --json` printed."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        flat = {who: dict(_flat(found[who])) for who in ("teacher", "student")}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is not what `distill evaluate --json` prints; write it anew or remove it") from error
    lines = []
    for name in flat["teacher"]:
        pair = [flat[who].get(name) for who in ("teacher", "student")]
        cells = "".join(f"<td>{_cell(value)}</td>" for value in pair)
        lines.append(f'<tr><th scope="row">{escape(_label(name))}</th>{cells}</tr>')
    head = '<thead><tr><th scope="col">Figure</th><th scope="col">Teacher</th><th scope="col">Student</th></tr></thead>'
    return f'<div class="table"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _label(name: str) -> str:
    """A dotted key of a judgment in words."""
    part, _, last = name.rpartition(".")
    return ("95 % interval of " if part == "intervals" else "") + last.replace("_", " ")


def _samples(run: RunFolder) -> Iterator[str]:
    """The grids, the newest first and large."""
    paths = sorted(path for path in (run.folder / "samples").glob("[0-9]*.png") if path.stem.isdigit())
    if not paths:
        return
    last = len(paths) - 1
    shown = [paths[i] for i in sorted({round(k * last / (GRIDS - 1)) for k in range(GRIDS)}, reverse=True)]
    some = "" if len(shown) == len(paths) else f" {len(shown)} of {len(paths)} grids, evenly spread."
    yield _heading("Samples", f"The averaged student on the same prompts and seeds, the newest first.{some}")
    grids = [_picture(path, f"Samples after {si(int(path.stem))} images", wide=path == shown[0]) for path in shown]
    yield f'{grids[0]}<div class="grids">{"".join(grids[1:])}</div>'


def _picture(path: Path, words: str, wide: bool) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    alt = f'alt="{escape(words)}" src="data:image/png;base64,{data}"'
    return f'<figure class="grid{" wide" if wide else ""}"><img {alt}><figcaption>{escape(words)}</figcaption></figure>'


def _curves(rows: list[Metrics]) -> Iterator[str]:
    """Every logged series, in sections of small charts, with its figures in a table below."""
    if not rows:
        yield _heading("Curves", "Nothing is logged yet.")
        return
    thinned = _thin(rows)
    charts: dict[str, dict[str, list[str]]] = {
        section: {key: [] for key in kept} for section, kept in _SECTIONS.items()
    }
    charts["More"] = {}
    for name in _names(rows):
        section, key = _place(name)
        charts[section].setdefault(key, []).append(name)
    for section, keys in charts.items():
        names = [name for found in keys.values() for name in found]
        if not names:
            continue
        yield _heading(section)
        drawn = [chart for key, found in keys.items() for chart in _charts(section, key, found, thinned)]
        yield f'<div class="panels">{"".join(drawn)}</div>'
        table = _metrics_table(thinned, names)
        yield f"<details><summary>{escape(section)}: the figures as a table</summary>{table}</details>"
    if len(thinned) < len(rows):
        yield f'<p class="note">Points are means of {-(-len(rows) // POINTS)} lines of the log.</p>'


def _place(name: str) -> tuple[str, str]:
    """Section and chart of a series."""
    group = name.partition("/")[0]
    for section, panels in _SECTIONS.items():
        for key in (name, group):
            if key in panels:
                return section, key
    return ("Cost" if "second" in name else "More"), group


def _charts(section: str, key: str, names: Sequence[str], rows: list[Metrics]) -> Iterator[str]:
    panel = _SECTIONS.get(section, {}).get(key) or Panel(key.replace("_", " "))
    curves = {name.removeprefix(f"{key}/"): _curve(rows, name) for name in names}
    if len(curves) > CURVES:
        for label, curve in curves.items():
            yield _chart(Panel(f"{panel.title}, {label}", panel.unit, panel.note), {label: curve})
    elif curves:
        yield _chart(panel, curves)


def _chart(panel: Panel, curves: Mapping[str, Curve], span: tuple[float, float] | None = None) -> str:
    """One chart with its title and legend; `span` is the least that the vertical axis shows."""
    width, height, left, right, top, bottom = 360, 190, 46, 14, 10, 38
    xs = sorted({x for curve in curves.values() for x, _ in curve})
    ys = [y for curve in curves.values() for _, y in curve]
    low, high = min([*ys, *(span or ())]), max([*ys, *(span or ())])
    if 0 < low < high / 2:  # zero is near enough to be shown
        low = 0.0
    y_ticks = _ticks(low, high, 4)
    low, high = y_ticks[0], y_ticks[-1]
    digits = max(3, math.ceil(math.log10(max(-low, high) / (y_ticks[1] - low))) + 1)  # so that no two read alike
    x_ticks = _ticks(0, xs[-1], 4)

    def across(x: float) -> float:
        return left + (width - left - right) * x / max(x_ticks[-1], xs[-1])

    def up(y: float) -> float:
        return height - bottom - (height - top - bottom) * (y - low) / (high - low)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{up(y) + 4:.1f}" text-anchor="end">{si(y, digits=digits)}</text>')
    base = height - bottom
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>')
    for x in x_ticks:
        parts.append(f'<text x="{across(x):.1f}" y="{base + 15}" text-anchor="middle">{si(x)}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 5}" text-anchor="middle">images seen</text>')

    labels, legend, spoken = _labels(list(curves)), [], []
    for (name, curve), color in zip(curves.items(), _colors(list(curves)), strict=True):
        line = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in curve)
        dots = curve if len(curve) <= DOTTED else curve[-1:]
        circles = "".join(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.2"/>' for x, y in dots)
        parts.append(f'<g style="--c:{color}"><path d="M{line}"/>{circles}</g>')
        who = "" if len(curves) == 1 else f"{escape(labels[name])} "
        legend.append(f'<li style="--c:{color}"><i></i>{who}<b>{si(curve[-1][1])}</b></li>')
        spoken.append(f"{who}from {si(curve[0][1])} to {si(curve[-1][1])}")

    # A strip over each logged point shows its figures when pointed at, without a script.
    at = {name: dict(curve) for name, curve in curves.items()}
    edges = [0.0, *((a + b) / 2 for a, b in zip(xs, xs[1:], strict=False)), xs[-1]]
    for x, start, stop in zip(xs, edges, edges[1:], strict=False):
        found = [(labels[name], values[x]) for name, values in at.items() if x in values]
        words = "\n".join([f"{si(x)} images", *(f"{label}: {si(value)}" for label, value in found)])
        strip = f'x="{across(start):.1f}" width="{across(stop) - across(start):.1f}" y="{top}" height="{base - top}"'
        line = f'x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{top}" y2="{base}"'
        parts.append(f'<g class="at"><title>{escape(words)}</title><rect {strip}/><line {line}/></g>')

    title = escape(panel.title[:1].upper() + panel.title[1:])
    unit = f' <span class="unit">{escape(panel.unit)}</span>' if panel.unit else ""
    note = f'<p class="note">{escape(panel.note)}</p>' if panel.note else ""
    aria = f'role="img" aria-label="{title} over {si(xs[-1])} images seen: {"; ".join(spoken)}"'
    return (
        f'<figure class="panel"><h3>{title}{unit}</h3>{note}<ul class="legend">{"".join(legend)}</ul>'
        f'<svg viewBox="0 0 {width} {height}" {aria}>{"".join(parts)}</svg></figure>'
    )


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Curves `t0.2`, `t0.4` of buckets of time are named by their ranges, other curves by their names."""
    starts = [_bucket(name) for name in names]
    if len(names) > 1 and all(start is not None for start in starts):
        stops = [*starts[1:], 1.0]
        return {name: f"t {a}–{b}" for name, a, b in zip(names, starts, stops, strict=True)}
    return {name: name.replace("_", " ") for name in names}


def _colors(names: Sequence[str]) -> list[str]:
    """A ramp for buckets of time, which are ordered; else one color each, the same role always in the same."""
    if len(names) > 1 and all(_bucket(name) is not None for name in names):
        shares = [100 * i / (len(names) - 1) for i in range(len(names))]
        return [f"color-mix(in oklab, var(--late) {share:.0f}%, var(--early))" for share in shares]
    roles = {"student": 0, "fake": 1}
    return [f"var(--c{roles.get(name, i)})" for i, name in enumerate(names)]


def _bucket(name: str) -> float | None:
    """Where a bucket of time begins, by its curve's name."""
    try:
        return float(name[1:]) if name[:1] == "t" else None
    except ValueError:
        return None


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` steps of 1, 2 or 5 times a power of ten."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - abs(low) / 2, high + (abs(high) / 2 or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _curve(rows: list[Metrics], name: str) -> Curve:
    return [(row["images"], row[name]) for row in rows if name in row]


def _names(rows: list[Metrics]) -> list[str]:
    """Every series of a log, in the order of first appearance."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name != "images"]


def _thin(rows: list[Metrics]) -> list[Metrics]:
    """At most POINTS rows: means of neighbors, at the last one's images."""
    every = -(-len(rows) // POINTS)
    thinned = []
    for part in (rows[i : i + every] for i in range(0, len(rows), every)):
        columns = {name: [row[name] for row in part if name in row] for name in _names(part)}
        means = {name: sum(values) / len(values) for name, values in columns.items()}
        thinned.append({"images": part[-1]["images"], **means})
    return thinned


def _metrics_table(rows: list[Metrics], names: Sequence[str], best: float | None = None) -> str:
    """Rows by images seen; the row of the best student is marked."""
    head = "".join(f'<th scope="col">{escape(name.replace("_", " "))}</th>' for name in ("images", *names))
    lines = []
    for row in rows:
        chosen = row["images"] == best
        cells = "".join(f"<td>{_cell(row.get(name))}</td>" for name in names)
        row_class, mark = (' class="best"', " · best") if chosen else ("", "")
        lines.append(f'<tr{row_class}><th scope="row">{si(row["images"])}{mark}</th>{cells}</tr>')
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return si(value)
    if isinstance(value, list):  # an interval
        return " to ".join(map(_cell, value))
    return "–" if value is None else escape(str(value))


def _config(run: RunFolder) -> Iterator[str]:
    yield _heading("Configuration", "As it was resolved, from config.yaml.")
    lines = [f"<div><dt>{escape(key)}</dt><dd>{escape(_plain(value))}</dd></div>" for key, value in _flat(run.config)]
    yield f'<dl class="config">{"".join(lines)}</dl>'


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "–" if value is None else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves with their dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _heading(text: str, note: str = "") -> str:
    return f"<h2>{escape(text)}</h2>" + (f'<p class="soft">{escape(note)}</p>' if note else "")
