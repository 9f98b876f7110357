"""The report and the list of runs show the content of run folders; a report needs no other file."""

import html
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import GARBAGE
from filelock import FileLock
from typer.testing import CliRunner

from distill.cli import app, console
from distill.errors import OutputError, RunError
from distill.report.charts import BOTTOM, TOP
from distill.report.grid import labeled_grid, save_png
from distill.report.html import GRIDS, POINTS, render_report, write_report
from distill.report.run_folder import read_run, read_runs
from distill.report.run_state import STATE, RunState, StateRecorder, write_state
from distill.report.units import si

SERIES = ("gap", "log10_gap/t0.0", "log10_gap/t0.4", "gradient_norm/fake", "gradient_norm/student", "latent/std")
HOSTILE = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """Tags with their attributes, the text between them, and whether every tag is closed in order."""

    VOID = ("meta", "img", "line", "rect", "circle", "path", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.marks: list[str] = []  # of the charts' axes
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open[-1:] == ["text"]:
            self.marks.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_run(folder: Path, seen: int, budget: int = 6400, teacher: str = "scenes", **series: float) -> Path:
    """Write a run folder as `distill run` does, with the given last metrics."""
    folder.mkdir(parents=True)
    config = {"teacher": teacher, "images": budget, "method": {"name": "fgm", "guidance": {"scale": 4.0}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = dict.fromkeys(SERIES, 0.5) | series
    lines = [{"images": images, **metrics} for images in range(640, seen + 1, 640)]
    write_lines(folder / "metrics.jsonl", lines)
    return folder


def write_lines(path: Path, lines: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def add_results(folder: Path) -> None:
    """Add evaluations, the best student's record, sample grids and the exported student."""
    write_lines(
        folder / "evaluations.jsonl",
        [
            {"images": 3200, "overall": 0.8125, "frechet": 41.7, "diversity": 0.9, "two_object": 0.3125},
            {"images": 6400, "overall": 0.7, "frechet": 43.9, "diversity": 0.8, "two_object": 0.25},
        ],
    )
    best = folder / "best" / f"{3200:012d}"
    best.mkdir(parents=True)
    (best / "state.json").write_text(json.dumps({"images": 3200, "overall": 0.8125, "fitness": 0.73}))
    (folder / "student").mkdir()
    (folder / "student" / "onestep.json").write_text("{}")
    state = RunState("finished", 6400, 6400, 1_000_000_000)
    (folder / STATE).write_text(json.dumps(asdict(state)))
    add_grid(folder, 3200)
    add_grid(folder, 6400)


def add_grid(folder: Path, images: int) -> None:
    tile = np.full((1, 4, 4, 3), 128, np.uint8)
    save_png(labeled_grid([("student", tile)], ["a circle"]), folder / "samples" / f"{images:012d}.png")


def page_of(folder: Path) -> Page:
    return Page(render_report(read_run(folder)))


def test_the_report_needs_nothing_from_outside(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400)
    add_results(folder)
    text = render_report(read_run(folder))
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.all("img"))
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_the_newest_picture_of_differences_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400, teacher="sd3")
    add_results(folder)
    for images in (3200, 6400):
        tile = np.full((1, 4, 4, 3), images % 255, np.uint8)
        save_png(labeled_grid([("student", tile)], ["a circle"]), folder / "evaluations" / f"{images:012d}.png")
    words = [image["alt"] for image in page_of(folder).all("img")]
    assert words[0] == "Largest differences from the teacher after 6.4 k images"


def test_the_command_that_compares_takes_the_settings_of_the_run(tmp_path: Path) -> None:
    """Guidance and sampling decide which images of the teacher are used; those of the run exist."""
    folder = make_run(tmp_path / "run", 6400, teacher="sd3")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["method"] = {"guidance": {"scale": [2, 6], "skip_layers": [7, 8], "skip_scale": 2.8}}
    config["evaluation"] = {"evaluator": "clip", "images": 32, "teacher_steps": 4, "prompts": "held out.txt"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    add_results(folder)
    save_png(labeled_grid([("student", np.zeros((1, 4, 4, 3), np.uint8))], ["a"]), folder / "evaluations" / "64.png")
    text = html.unescape(render_report(read_run(folder)))
    options = "--teacher sd3 --prompts 'held out.txt' --images 32 --steps 4 --guidance 4.0 --skip-layers 7,8"
    assert f"{options} --skip-scale 2.8 --references {folder}/references --json > {folder}/evaluation.json" in text
    assert "Lowest CLIP scores after 64 images" in text


def test_every_picture_and_chart_has_words(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400)
    add_results(folder)
    page = page_of(folder)
    assert [image["alt"] for image in page.all("img")] == ["Samples after 6.4 k images", "Samples after 3.2 k images"]
    charts = page.all("svg")
    assert charts
    assert all(chart["role"] == "img" and "training samples" in (chart["aria-label"] or "") for chart in charts)


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400, teacher=HOSTILE, **{"<b>odd</b>/<i>x": 1.0})
    write_lines(folder / "evaluations.jsonl", [{"images": 640, "<u>task": 0.5}])
    (folder / "evaluation.txt").write_text("<em>teacher</em>")
    text = render_report(read_run(folder))
    page = Page(text)
    assert not {"script", "em", "u"} & {tag for tag, _ in page.tags}
    assert page.all("i") == [{}] * len(page.all("i"))  # the legend's own
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quoted&#34;") == 2
    assert "<b>odd" not in text
    assert HOSTILE in page.text
    assert "<em>teacher</em>" in page.text


def test_every_logged_series_is_drawn_and_stands_in_a_table(tmp_path: Path) -> None:
    values = {name: 0.101 + 0.111 * i for i, name in enumerate((*SERIES, "memory/allocated", "unheard_of"))}
    page = page_of(make_run(tmp_path / "run", 6400, **values))
    spoken = " ".join(chart["aria-label"] or "" for chart in page.all("svg"))
    for name, value in values.items():
        assert f"to {si(value)}" in spoken, name
        assert name.replace("_", " ") in page.text


def test_buckets_of_time_are_named_by_their_ranges(tmp_path: Path) -> None:
    """They are in the order of time, even if the log's first line lacks a bucket; empty ones are left out."""
    folder = make_run(tmp_path / "run", 0)
    logged = [("t0.4", "t0.8"), ("t0.0", "t0.4", "t0.8"), ("t0.0", "t0.8")]
    lines = [{"images": 640 * i, **{f"log10_gap/{name}": 0.5 for name in names}} for i, names in enumerate(logged, 1)]
    write_lines(folder / "metrics.jsonl", lines)
    assert re.findall(r"t \d\.\d–\d\.\d", page_of(folder).text)[:3] == ["t 0.0–0.2", "t 0.4–0.6", "t 0.8–1.0"]


def test_a_number_that_is_not_finite_and_half_a_line_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 1280)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"images": 1920, "gap": NaN, "latent/std": 0.75}\n{"images": 2560, "ga')
    run = read_run(folder)
    assert run.images == 1920
    assert run.metrics[-1] == {"images": 1920, "latent/std": 0.75}
    assert "nan" not in render_report(run).lower()


def test_garbage_in_the_logs_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 1280)
    before = read_run(folder)
    for name in ("metrics.jsonl", "evaluations.jsonl", "alarms.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(GARBAGE)
    run = read_run(folder)
    assert (run.metrics, run.evaluations, run.alarms) == (before.metrics, before.evaluations, before.alarms)
    assert render_report(run)
    assert [each.images for each in read_runs(tmp_path)] == [before.images]


def test_evaluations_stand_in_the_report_and_the_best_is_marked(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400)
    add_results(folder)
    page = page_of(folder)
    for figure in ("0.812", "41.7", "0.312", "43.9", "0.25"):
        assert figure in page.text
    assert len([row for row in page.all("tr") if row.get("class") == "best"]) == 1
    assert "3.2 k · best" in page.text


def test_the_teachers_metrics_are_drawn_in_the_panels(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400, teacher="sd3")
    add_results(folder)

    def drawn() -> list[str]:
        spoken = [chart["aria-label"] or "" for chart in page_of(folder).all("svg")]
        return [text.rpartition("; ")[2] for text in spoken if "teacher" in text]

    assert drawn() == []
    both = {
        "teacher": {"overall": 0.9, "frechet": 7.0, "diversity": 0.5, "tasks": {"two_object": 0.875}},
        "student": {},
    }
    (folder / "evaluation.json").write_text(json.dumps(both))
    assert drawn() == ["teacher 0.9", "teacher 0.5", "teacher 0.875"]  # a Frechet distance of other images is not
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "teacher.json").write_text(json.dumps({"frechet": 0.0, "diversity": 1.0}))
    assert drawn() == ["teacher 0", "teacher 1"]
    heights = [line["y1"] for line in page_of(folder).all("line") if line.get("class") == "teacher"]
    assert all(TOP <= float(height or "nan") <= BOTTOM for height in heights)
    assert len(heights) == 2


def test_the_wall_time_is_that_of_all_sessions(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 640)
    assert "wall time" not in page_of(folder).text
    write_state(folder, "interrupted", 640, 6400, 3660)
    StateRecorder(folder, 6400).record("training")
    assert "1 h 01 min" in page_of(folder).text


def test_teacher_against_student_is_shown_once_it_is_judged(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400)
    assert "distill evaluate --student" in page_of(folder).text
    judged = {
        who: {"overall": score, "tasks": {"colors": score / 2}} for who, score in [("teacher", 0.9), ("student", 0.6)]
    }
    (folder / "evaluation.json").write_text(json.dumps(judged))
    text = page_of(folder).text
    assert "distill evaluate --student" not in text
    assert all(figure in text for figure in ("0.9", "0.6", "0.45", "0.3", "colors"))


def test_a_judgment_in_another_form_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400)
    (folder / "evaluation.json").write_text("")
    with pytest.raises(RunError, match=r"evaluation\.json"):
        render_report(read_run(folder))


def test_a_run_that_never_started_has_a_report(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", 0))
    assert "never started" in page.text
    assert "Nothing is logged yet" in page.text


def test_long_runs_make_bounded_pages(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 640 * (3 * POINTS + 1), budget=10**6)
    for i in range(1, GRIDS + 9):
        add_grid(folder, i)
    page = page_of(folder)
    shown = [image["alt"] for image in page.all("img")]
    assert len(shown) == GRIDS
    assert shown[0] == f"Samples after {GRIDS + 8} images"
    assert shown[-1] == "Samples after 1 images"
    assert len([group for group in page.all("g") if group.get("class") == "at"]) <= POINTS * len(page.all("svg"))
    assert "means of 4 lines" in page.text


def test_training_time_and_speed_are_those_of_the_log(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 1280)
    write_lines(
        folder / "metrics.jsonl",
        [{"images": images, "wall_seconds": wall} for images, wall in ((640, 10.0), (1280, 30.0), (1920, 37.0))],
    )
    page = page_of(folder)
    assert "37 s" in page.text
    assert "64 images/s" in " ".join(page.text.split()) or "64images/s" in page.text
    assert "wall_seconds" not in page.text


def test_states(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0)
    make_run(tmp_path / "b", 1280)
    make_run(tmp_path / "c", 6400)  # killed before the export
    add_results(make_run(tmp_path / "d", 6400))
    add_results(make_run(tmp_path / "e", 6400, budget=12_800))  # given a larger budget
    make_run(tmp_path / "f", 1280)
    (tmp_path / "f" / "checkpoints" / f"{1500:012d}").mkdir(parents=True)
    with FileLock(tmp_path / "f" / ".lock"):
        found = {run.name: (run.state, run.images) for run in read_runs(tmp_path)}
    assert found == {
        "a": ("never started", 0),
        "b": ("stopped", 1280),
        "c": ("stopped", 6400),
        "d": ("finished", 6400),
        "e": ("stopped", 6400),
        "f": ("running", 1500),
    }


def test_a_run_that_stopped_early_is_finished(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3200)
    add_results(folder)  # the best student is that after 3200 images, and there is one evaluation after it
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for patience, state in ((None, "stopped"), (2, "stopped"), (1, "finished")):
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"early_stopping_patience": patience}))
        assert read_run(folder).state == state


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a terminal so wide that no table is folded."""
    monkeypatch.setattr(console.out, "_width", 200)


@pytest.mark.usefixtures("wide")
def test_alarms_are_shown_and_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3200)
    assert "Alarms" not in page_of(folder).text
    lines = [{"name": name, "images": 1920, "message": f"{name} <b>is bad</b>"} for name in ("collapse", "too-fast")]
    (folder / "alarms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"na')
    page = page_of(folder)
    assert "After 1.92 k images: collapse <b>is bad</b>." in page.text
    assert page.all("b") == [{}] * len(page.all("b"))
    result = CliRunner().invoke(app, ["runs", str(tmp_path)], catch_exceptions=False)
    (line,) = [line for line in result.output.splitlines() if "3.2 k" in line]
    assert " 2 " in line


@pytest.mark.usefixtures("wide")
def test_runs_are_listed_and_other_folders_are_not(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", 6400)
    add_results(folder)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("model: something else\n")
    (tmp_path / "file.txt").write_text("not a folder")
    result = CliRunner().invoke(app, ["runs", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    (line,) = [line for line in result.output.splitlines() if "mine" in line]
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(1_000_000_000))
    for cell in ("scenes", "6.4 k / 6.4 k", "0.812", changed, "finished"):
        assert cell in line
    assert all(f" {name} " not in result.output for name in ("other", "pictures", "file.txt"))


def test_a_folder_that_is_not_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run: it has no config\.yaml"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(RunError, match="cannot be read as YAML"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text("- a list\n")
    with pytest.raises(RunError, match="names no teacher"):
        read_run(tmp_path)
    with pytest.raises(RunError, match="there is no folder"):
        read_runs(tmp_path / "missing")


def test_the_command_writes_the_page_where_it_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400)
    for arguments, page in [
        ([], folder / "report.html"),
        (["--out", str(tmp_path / "new" / "a.html")], tmp_path / "new" / "a.html"),
    ]:
        result = CliRunner().invoke(app, ["report", str(folder), *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
        assert list(page.parent.glob(".*partial")) == []


def test_a_report_replaces_a_report_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400)
    for _ in range(2):
        write_report(read_run(folder), tmp_path / "a.html")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(OutputError, match=r"metrics\.jsonl exists and was not written by this program"):
        write_report(read_run(folder), folder / "metrics.jsonl")
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("last", [0, 0.5, 1e-7, -3e9, 0.50001])
def test_curves_stay_inside_their_charts_and_ticks_differ(tmp_path: Path, last: float) -> None:
    folder = make_run(tmp_path / "run", 0)
    write_lines(folder / "metrics.jsonl", [{"images": 640, "figure": 0.5}, {"images": 1280, "figure": last}])
    page = page_of(folder)
    (view,) = page.all("svg")
    _, _, width, height = map(float, str(view["viewbox"]).split())
    places = [(float(str(circle["cx"])), float(str(circle["cy"]))) for circle in page.all("circle")]
    assert len(places) == 2
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
    across = page.marks.index("0", page.marks.index("0") + 1) if page.marks.count("0") == 2 else page.marks.index("0")
    assert len(set(page.marks[:across])) == across >= 3


def test_torch_is_not_imported(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6400)
    code = (
        "import sys; from distill.cli import app; "
        f"app(['report', {str(folder)!r}], standalone_mode=False); "
        f"app(['runs', {str(tmp_path)!r}], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
