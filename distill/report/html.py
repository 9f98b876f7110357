"""The report of a run: one HTML file with inline SVG and images, without scripts and without external files.

Jinja2 escapes every value of the run folder. torch is not imported.
"""

import base64
import math
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from statistics import median_high
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distill.config import flat
from distill.files import MARK, atomic_write_text, check_replaceable
from distill.report import charts
from distill.report.alarms import Metrics
from distill.report.charts import Chart, Curve, Panel, chart
from distill.report.evaluation_output import (
    EVALUATION,
    PICTURE,
    evaluate_command,
    group,
    read_evaluation,
    teacher_metrics,
)
from distill.report.run_folder import EVALUATED, RunFolder
from distill.report.units import duration, si

POINTS = 200  # maximum of a curve; longer logs are averaged
GRIDS = 12  # maximum number of sample grids
CURVES = 6  # maximum in one chart; a metric with more curves gets a chart for each

# A metric `a/b` is curve `b` of chart `a`, unless `a/b` has an entry of its own.
_SECTIONS = {
    "Distillation": {
        "gap": Panel("Gap", "|u − v|²", "Teacher's velocity u and fake's velocity v on the student's images."),
        "log10_gap": Panel("Gap by time", "log₁₀ |u − v|²", "t = 0 is the image, t = 1 is noise."),
        "loss": Panel("Losses", "", "They oscillate around zero or drift with the student; a weak indicator."),
        "flow_matching": Panel("Fake's error", "|v − w|²", "How well the fake models the student's images."),
        "log10_flow_matching": Panel("Fake's error by time", "log₁₀ |v − w|²"),
        "regression": Panel("Regression", "|v − (z − x₀)|²", "The student on the teacher's pairs of noise and image."),
        "log10_regression": Panel("Regression by time", "log₁₀ |v − (z − x₀)|²"),
        "residual": Panel("Residual", "", "Squared distance of the student from the teacher's flow map."),
        "log10_residual": Panel("Residual by time", "log₁₀", "t is the start of a jump; 1 is noise."),
        "gradient_norm": Panel("Gradient norms", "before clipping"),
        "update_ratio": Panel("Update ratios", "|update| / |weights|", "Of one round, at each line of the log."),
        "skipped": Panel("Skipped steps", "share", "Steps whose gradient was not finite."),
        "psnr": Panel("PSNR in training", "dB", "Of parts of images, against the VAE's."),
    },
    "The student's latents": {
        "latent/std": Panel("Standard deviation", "", "1 for the autoencoder's latents of real images."),
        "latent/diversity": Panel("Diversity", "RMS distance in a batch", "A fall to 0 is mode collapse."),
        "latent/saturated": Panel("Saturated", "share beyond ±3"),
    },
    "Cost": {
        "images_per_second": Panel("Speed", "images/s", "Without sample grids, evaluations and checkpoints."),
        "seconds": Panel("Time", "s"),
        "memory": Panel("Memory", "B", "Of the GPU, or of the process without a GPU."),
    },
}
_EVALUATED = {
    "overall": Panel("Overall score", "share correct", "Higher is better."),
    "fitness": Panel("Fitness", "score × diversity", "Higher is better; it decides which student is the best."),
    "kernel": Panel("Kernel distance", "", "Lower is better; about 0 for the teacher."),
    "frechet": Panel("Fréchet distance", "", "Lower is better."),
    "clip_score": Panel("CLIP score", "", "Higher is better."),
    "diversity": Panel("Diversity", "", "Higher is better."),
    "relative_diversity": Panel("Diversity", "1 = the teacher's", "Of the images of one prompt."),
    "grid": Panel("Grid artifacts", "1 = the teacher's", "Energy at the period of the transformer's patches."),
    "saturation": Panel("Saturation", "share of 0 and 255"),
    "recall": Panel("Recall", "", "Higher is better."),
    "psnr": Panel("PSNR", "dB", "Against the VAE's images; higher is better."),
    "ssim": Panel("SSIM", "", "Against the VAE's images; 1 for equal ones."),
    "sharpness": Panel("Sharpness", "1 = the VAE's", "Differences between neighboring pixels."),
    "color_shift": Panel("Color shift", "levels of 255", "Largest difference of a channel's mean."),
    "time_ratio": Panel("Time", "1 = the VAE's", "Of decoding one image in fp32, in the training's process."),
    "score": Panel("Score", "share correct", "Of the dataset; higher is better."),
    "full_score": Panel("Score of the VAE", "share correct"),
    "score_ratio": Panel("Score", "1 = the VAE's"),
}


def write_report(run: RunFolder, out: Path) -> None:
    """Write the report atomically. Raises RunError for damaged files, OutputError if `out` is no report."""
    check_replaceable(out)
    atomic_write_text(out, render_report(run))


def render_report(run: RunFolder) -> str:
    """Render the report of a run as HTML."""
    rows = _with_speeds(run.metrics)
    thinned = _thin(rows)
    method = run.config.get("method")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(si=si, cell=_cell, plain=_plain, words=_words, time=_local_time)
    return environment.get_template("report.html").render(
        run=run,
        product="decoder" if run.is_decoder else "student",
        mark=MARK,
        frame=charts,
        method=(method.get("name") if isinstance(method, dict) else None) or "distillation",
        percent=f"{min(100, 100 * run.images / max(run.budget, 1)):.1f}",
        tiles=list(_tiles(run, rows)),
        evaluation_names=_names(run.evaluations),
        evaluation_charts=list(_evaluation_charts(run)),
        comparison=_comparison(run),
        differences=_differences(run),
        samples=_samples(run.folder),
        rows=thinned,
        sections=list(_sections(rows, thinned)),
        lines_per_point=-(-len(rows) // POINTS),
        config=list(flat(run.config)),
        now=time.time(),
    )


def _with_speeds(rows: Sequence[Metrics]) -> list[Metrics]:
    """The log with images per second of training since the line before, in place of the time since the start."""
    found = []
    for before, after in pairwise([{"images": 0, "wall_seconds": 0.0}, *rows]):
        row = {name: value for name, value in after.items() if name != "wall_seconds"}
        seconds = after.get("wall_seconds", math.nan) - before.get("wall_seconds", math.nan)
        if seconds > 0:
            row = {"images_per_second": (after["images"] - before["images"]) / seconds, **row}
        found.append(row)
    return found


def _tiles(run: RunFolder, rows: Sequence[Metrics]) -> Iterator[tuple[str, str]]:
    """The most important numbers, each with its label."""
    yield si(run.images), f"training samples of {si(run.budget)}"
    product = "decoder" if run.is_decoder else "student"
    best = "last decoder" if run.is_decoder else "best student"
    where = f"{best}, at {si(run.best['images'])}" if "images" in run.best else best
    for name, panel in _EVALUATED.items():
        if name in run.best:
            yield si(run.best[name]), f"{panel.title}, {where}"
    if run.metrics and "wall_seconds" in run.metrics[-1]:
        yield duration(run.metrics[-1]["wall_seconds"]), "training time"
    if run.seconds:
        yield duration(run.seconds), "wall time of all sessions, with evaluations"
    if speeds := [row["images_per_second"] for row in rows if "images_per_second" in row]:
        yield si(median_high(speeds)), "images/s, median"
    if peak := max((row.get("memory/peak", 0) for row in rows), default=0):
        yield si(peak, "B"), "peak memory"
    if size := sum(path.stat().st_size for path in (run.folder / product).rglob("*") if path.is_file()):
        yield si(size, "B"), f"{product} folder on disk"


def _evaluation_charts(run: RunFolder) -> Iterator[Chart]:
    """A chart for each metric of the evaluations, with the teacher's where known. Those of tasks have one scale."""
    evaluations, teacher = run.evaluations, teacher_metrics(run)
    names = _names(evaluations)
    tasks = [name for name in names if name not in _EVALUATED]
    highest = max((row[name] for row in [*evaluations, teacher] for name in tasks if name in row), default=0.0)
    for name, panel in _EVALUATED.items():
        if name in names:
            yield chart(panel, {name: _curve(evaluations, name)}, teacher=teacher.get(name))
    for task in tasks:
        panel = Panel(_title(task), "share correct")
        yield chart(panel, {task: _curve(evaluations, task)}, (0.0, highest), teacher.get(task))


def _comparison(run: RunFolder) -> dict[str, Any]:
    """The output of `distill evaluate` in a run folder, as rows or text, and the command that writes it."""
    values, text = run.folder / EVALUATION, run.folder / "evaluation.txt"
    picture = run.folder / PICTURE
    return {
        "rows": [(_label(name), *each) for name, *each in read_evaluation(values)] if values.exists() else None,
        "text": text.read_text(encoding="utf-8").strip() if text.exists() else None,
        "picture": _data_uri(picture) if picture.exists() else None,
        "command": f"{evaluate_command(run, picture)} --json > {shlex.quote(str(values))}",
    }


def _label(name: str) -> str:
    """A dotted key of an evaluation in words."""
    part, _, last = name.rpartition(".")
    return ("95 % interval of " if part == "intervals" else "") + _words(last)


def _samples(folder: Path) -> dict[str, Any]:
    """The sample grids, newest first: captions and data URIs, and the number of all grids."""
    paths = sorted(path for path in (folder / "samples").glob("[0-9]*.png") if path.stem.isdigit())
    chosen = sorted({round(k * (len(paths) - 1) / (GRIDS - 1)) for k in range(GRIDS)}, reverse=True) if paths else []
    grids = [(f"Samples after {si(int(paths[i].stem))} images", _data_uri(paths[i])) for i in chosen]
    return {"grids": grids, "total": len(paths)}


def _differences(run: RunFolder) -> tuple[str, str] | None:
    """Caption and data URI of the newest picture of an evaluation."""
    paths = sorted(path for path in (run.folder / EVALUATED).glob("[0-9]*.png") if path.stem.isdigit())
    if not paths:
        return None
    by_clip = group(run.config, "evaluation").get("evaluator") == "clip"
    shown = "Lowest CLIP scores" if by_clip else "Largest differences from the teacher"
    return f"{shown} after {si(int(paths[-1].stem))} images", _data_uri(paths[-1])


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _sections(rows: list[Metrics], thinned: list[Metrics]) -> Iterator[tuple[str, list[Chart], list[str]]]:
    """Title, charts and metric names of each section with metrics."""
    sections: dict[str, dict[str, list[str]]] = {title: {key: [] for key in _SECTIONS[title]} for title in _SECTIONS}
    sections["More"] = {}
    for name in _names(rows):
        title, key = _place(name)
        sections[title].setdefault(key, []).append(name)
    for title, charted in sections.items():
        names = [name for found in charted.values() for name in found]
        if names:
            panels = _SECTIONS.get(title, {})
            drawn = (_charts(panels.get(key) or Panel(_title(key)), key, charted[key], thinned) for key in charted)
            yield title, list(chain.from_iterable(drawn)), names


def _place(name: str) -> tuple[str, str]:
    """Section and chart of a metric."""
    group = name.partition("/")[0]
    found = ((title, key) for title, panels in _SECTIONS.items() for key in (name, group) if key in panels)
    return next(found, ("Cost" if "second" in name else "More", group))


def _charts(panel: Panel, key: str, names: Sequence[str], rows: list[Metrics]) -> Iterator[Chart]:
    curves = {name.removeprefix(f"{key}/"): _curve(rows, name) for name in names}
    if len(curves) > CURVES:
        for label, curve in curves.items():
            yield chart(Panel(f"{panel.title}, {label}", panel.unit, panel.note), {label: curve})
    elif curves:
        yield chart(panel, curves)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _title(name: str) -> str:
    return _words(name[:1].upper() + name[1:])


def _curve(rows: Iterable[Metrics], name: str) -> Curve:
    return [(row["images"], row[name]) for row in rows if name in row]


def _names(rows: Iterable[Metrics]) -> list[str]:
    """Every metric of a log, in the order of first appearance."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name != "images"]


def _thin(rows: list[Metrics]) -> list[Metrics]:
    """At most POINTS rows: means of consecutive rows, at the images of the last one."""
    every = max(1, -(-len(rows) // POINTS))
    thinned = []
    for part in (rows[i : i + every] for i in range(0, len(rows), every)):
        columns = {name: [row[name] for row in part if name in row] for name in _names(part)}
        means = {name: sum(values) / len(values) for name, values in columns.items()}
        thinned.append({"images": part[-1]["images"], **means})
    return thinned


def _cell(value: Any) -> str:
    """A value of a metrics table: a number, an interval or text."""
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return si(value) if isinstance(value, int | float) else _plain(value)


def _plain(value: Any) -> str:
    """A value of the configuration."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "–" if value is None else str(value)


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
