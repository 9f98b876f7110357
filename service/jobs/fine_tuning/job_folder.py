"""`JobFolder`: the files of a job: its prompts, the output of its processes, and the folder of `distill run`.

This is all that the service knows of a run folder: names of files that docs/distill.md documents.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from service.jobs.fine_tuning.run_log import Kind, LogLine, RunLog

LOGS: dict[Kind, str] = {"metrics": "metrics.jsonl", "evaluation": "evaluations.jsonl", "alarm": "alarms.jsonl"}
READABLE = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".tsv", ".parquet")  # endings of files of prompts
PHASES = {name: name for name in ("encoding", "sampling", "training")}
PHASES |= {"finished": "exporting", "ended early": "exporting"}  # by the phase in state.json; others are a start
LOG_BYTES = 1 << 20  # of the console that clients are shown
TAIL_BYTES = 4096  # of the console that are searched for an error


class JobFolder:
    """The folder of one job, read by one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.run = path / "run"
        self.student = self.run / "student"
        self.console = path / "console.log"
        self._logs = {kind: RunLog(kind, self.run / name) for kind, name in LOGS.items()}
        self._read_lines: set[str] = set()
        self._metrics: dict[int, dict[str, Any]] = {}  # by number of images, in the order of the log
        self._evaluations: dict[int, dict[str, Any]] = {}
        self._read_checkpoints: set[int] = set()

    @classmethod
    def of(cls, data: Path, job_id: str) -> "JobFolder":
        """Return the folder of a job in the data folder."""
        return cls(data / "distillations" / job_id)

    def prompts(self) -> Path | None:
        """Return the job's copy of its prompts, if there is one."""
        return next(self._path.glob("prompts.*[!~]"), None)

    def keep_prompts(self, source: Path, suffix: str) -> Path:
        """Link or copy a file of prompts into this folder, so that the original can be deleted."""
        kept = self._path / f"prompts{suffix}"
        self._path.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, kept)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, copy := kept.with_name(f"{kept.name}~"))
            copy.replace(kept)
        return kept

    def budget(self) -> int | None:
        """Return the number of images of the run, in whole batches, or None before it has started."""
        try:
            config = yaml.safe_load((self.run / "config.yaml").read_text(encoding="utf-8"))
            images, batch = int(config["images"]), int(config["batch"])
            return -(-images // batch) * batch
        except (FileNotFoundError, ValueError, TypeError, KeyError, ZeroDivisionError, yaml.YAMLError):
            return None

    def has_run(self) -> bool:
        """Whether its run has started, so that it can have a report."""
        return (self.run / "config.yaml").is_file()

    def phase(self) -> str:
        """Return the phase of a run in progress."""
        try:
            phase = json.loads((self.run / "state.json").read_text(encoding="utf-8"))["phase"]
        except (OSError, ValueError, TypeError, KeyError):
            return "starting"
        return PHASES.get(phase, "starting") if isinstance(phase, str) else "starting"

    def new_lines(self) -> Iterator[LogLine]:
        """Yield the lines of the logs that were not returned before, each log in its order."""
        for log in self._logs.values():
            for line in log.new():
                if line.kind != "alarm":
                    values = {name: value for name, value in line.values.items() if name != "images"}
                    (self._metrics if line.kind == "metrics" else self._evaluations)[line.images] = values
                if line.key not in self._read_lines:
                    self._read_lines.add(line.key)
                    yield line

    def metrics(self, images: int) -> dict[str, Any]:
        """Return what `new_lines` has found of the student after so many images: newest metrics, and evaluation."""
        newest = max((each for each in self._metrics if each <= images), default=images)
        return self._metrics.get(newest, {}) | self._evaluations.get(images, {})

    def results(self) -> str:
        """Return the metrics and evaluations that `new_lines` has found as CSV, by number of images."""
        steps = sorted({*self._metrics, *self._evaluations})
        rows = [{"step": step} | self._metrics.get(step, {}) | self._evaluations.get(step, {}) for step in steps]
        table = io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        return table.getvalue()

    def checkpoints(self) -> list[int]:
        """Return the numbers of images of the checkpoints, oldest first."""
        return sorted(int(path.name) for path in (self.run / "checkpoints").glob("[0-9]*") if path.name.isdecimal())

    def new_checkpoints(self) -> list[int]:
        """Return the checkpoints that were not returned before."""
        new = [images for images in self.checkpoints() if images not in self._read_checkpoints]
        self._read_checkpoints.update(new)
        return new

    def newest_sample(self) -> Path | None:
        """Return the newest grid of sample images, if there is one."""
        return max((self.run / "samples").glob("*.png"), default=None)

    def has_student(self) -> bool:
        return (self.student / "onestep.json").exists()

    def without_path(self, text: str) -> str:
        """Return a text without the path of this folder, which clients do not need to know."""
        return text.replace(f"{self._path}/", "").replace(str(self._path), "")

    def log(self) -> str | None:
        """Return what its processes have printed, the last megabyte of it; None before the first one."""
        try:
            with self.console.open("rb") as file:
                file.seek(max(0, self.console.stat().st_size - LOG_BYTES))
                return self.without_path(file.read().decode("utf-8", errors="replace"))
        except FileNotFoundError:
            return None

    def log_tail(self) -> str:
        """Return the last line that its process printed."""
        return next(self._console_lines(), "")

    def error(self) -> str:
        """Return the error of its last process: the last line that begins with `error: `, else the last line."""
        errors = (line.removeprefix("error: ") for line in self._console_lines() if line.startswith("error: "))
        return next(errors, self.log_tail())

    def _console_lines(self) -> Iterator[str]:
        """Yield the last lines of the console, newest first, without the path of this folder."""
        try:
            with self.console.open("rb") as file:
                file.seek(max(0, self.console.stat().st_size - TAIL_BYTES))
                lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
        except FileNotFoundError:
            return
        for line in reversed(lines):
            yield self.without_path(line)

    def remove_student(self) -> None:
        shutil.rmtree(self.student, ignore_errors=True)

    def remove_checkpoints(self) -> None:
        """Delete what a finished run no longer needs: checkpoints, caches and measurements."""
        for name in ("checkpoints", "best", "embeddings", "images", "references", ".speed"):
            shutil.rmtree(self.run / name, ignore_errors=True)
        (self.run / "online-prompts.jsonl").unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
