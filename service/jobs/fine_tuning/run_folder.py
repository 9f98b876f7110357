"""A run folder as the service sees it: its process, and the files that `distill run` leaves, documented in distill.md.

Only files are read: nothing here imports the distillation half.
"""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import yaml

Kind = Literal["metrics", "evaluation", "alarm"]
LOGS: dict[Kind, str] = {"metrics": "metrics.jsonl", "evaluation": "evaluations.jsonl", "alarm": "alarms.jsonl"}
READABLE = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".tsv", ".parquet")  # endings of files of prompts
TAIL_BYTES = 4096  # bytes of the console's end that an error is looked for in
BLOCK = 1 << 16  # bytes of a log that are read at a time from its end
GRACE_SECONDS = 300  # that a run gets to write its checkpoint


@dataclass(frozen=True)
class LogLine:
    """A line of one of a run's logs, after so many images. A run that goes on writes lines of the same `key` again."""

    kind: Kind
    images: int
    values: dict[str, Any]

    @property
    def key(self) -> str:
        """What it is known again by in its run."""
        return f"{self.kind}-{self.values.get('name', self.images)}"


class LogReader:
    """A file of lines that somebody else appends to, or replaces by a shorter one, which then grows again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = b""  # line that was read
        self._end = 0  # of it in the file

    def new(self) -> Iterator[bytes]:
        """The whole lines since those read last; from the beginning where the last one no longer lies there."""
        with self._open() as file:
            file.seek(self._end - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._last, self._end = b"", 0
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._last, self._end = line, self._end + len(line)
                yield line

    def backwards(self) -> Iterator[bytes]:
        """All lines, the last first; no more of the file is read than is asked for."""
        with self._open() as file:
            start, rest = file.seek(0, os.SEEK_END), b""
            while start:
                length = min(start, BLOCK)
                start -= length
                file.seek(start)
                rest, *lines = (file.read(length) + rest).split(b"\n")
                yield from reversed(lines)
            yield rest

    def _open(self) -> BinaryIO:
        """The file; an empty one before it is there."""
        try:
            return self._path.open("rb")
        except FileNotFoundError:
            return io.BytesIO()


class JobFolder:
    """One run: `path` is the folder of `distill run`, and `console` beside it what its process printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.student = path / "student"
        self.console = path.with_name("console.log")
        self._logs = {kind: LogReader(path / name) for kind, name in LOGS.items()}
        self._told: set[str] = set()
        self._seen: set[int] = set()

    def prompts(self) -> Path | None:
        """The prompts of the job, once they are kept."""
        return next(self.path.parent.glob("prompts.*[!~]"), None)

    def keep_prompts(self, source: Path, suffix: str) -> Path:
        """Keep a file of prompts as this job's own: whoever deletes the other name does not take it away."""
        kept = self.path.parent / f"prompts{suffix}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, kept)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, made := kept.with_name(f"{kept.name}~"))
            made.replace(kept)
        return kept

    def budget(self) -> int | None:
        """Images that the run is to see, in whole batches; None before it has begun."""
        try:
            config = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
            images, batch = int(config["images"]), int(config["batch"])
            return -(-images // batch) * batch
        except (FileNotFoundError, ValueError, TypeError, KeyError, ZeroDivisionError, yaml.YAMLError):
            return None

    def new_lines(self) -> Iterator[LogLine]:
        """The lines of the logs that were not asked for before, each log in its order, as they are read."""
        for kind, log in self._logs.items():
            for line in _parsed(kind, log.new()):
                if line.key not in self._told:
                    self._told.add(line.key)
                    yield line

    def metrics(self, images: int) -> dict[str, Any]:
        """What is known of the student after so many images: the newest metrics of then, and its evaluation."""
        found: dict[str, Any] = {}
        for kind in ("metrics", "evaluation"):
            newest = (line for line in _parsed(kind, self._logs[kind].backwards()) if line.images <= images)
            line = next(newest, None)
            if line is not None and (kind == "metrics" or line.images == images):
                found.update(line.values)
        found.pop("images", None)
        return found

    def results(self) -> str:
        """Its metrics and evaluations as CSV: a row for each number of images that there are metrics of, in order."""
        rows: dict[int, dict[str, Any]] = {}
        for kind in ("metrics", "evaluation"):
            for line in _parsed(kind, LogReader(self.path / LOGS[kind]).new()):
                rows.setdefault(line.images, {"step": line.images}).update(line.values)
        columns = dict.fromkeys(name for row in rows.values() for name in row if name != "images")
        table = io.StringIO()
        writer = csv.DictWriter(table, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[images] for images in sorted(rows))
        return table.getvalue()

    def checkpoints(self) -> list[int]:
        """Images of the checkpoints that are kept, the oldest first."""
        return sorted(int(path.name) for path in (self.path / "checkpoints").glob("[0-9]*") if path.name.isdecimal())

    def new_checkpoints(self) -> list[int]:
        """Those that were not asked for before."""
        new = [images for images in self.checkpoints() if images not in self._seen]
        self._seen.update(new)
        return new

    def newest_sample(self) -> Path | None:
        """The last grid of images that it drew, if there is one."""
        return max((self.path / "samples").glob("*.png"), default=None)

    def finished(self) -> bool:
        """Whether the student lies there whole."""
        return (self.student / "onestep.json").exists()

    def log_tail(self) -> str:
        """The last line that its process printed."""
        return next(self._said(), "")

    def reason(self) -> str:
        """The error that ended its process, one sentence after `error: `; libraries may print lines after it."""
        errors = (line.removeprefix("error: ") for line in self._said() if line.startswith("error: "))
        return next(errors, self.log_tail())

    def _said(self) -> Iterator[str]:
        """The last lines that its process printed, the newest first."""
        try:
            with self.console.open("rb") as file:
                file.seek(max(0, self.console.stat().st_size - TAIL_BYTES))
                lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
        except FileNotFoundError:
            return
        for line in reversed(lines):
            yield line.replace(f"{self.path.parent}/", "")  # where this server keeps it is nobody's business

    @contextmanager
    def process(
        self, command: Sequence[str], environment: dict[str, str], nice: int, processes: int = 1
    ) -> Iterator["Child"]:
        """Its process, for as long as the block lasts; then it is asked to stop, which writes a checkpoint.

        Several `processes` of the same command share the run, as under `accelerate launch`.
        """
        supervisor = [
            sys.executable,
            "-m",
            "service.jobs.fine_tuning.process_supervisor",
            str(GRACE_SECONDS),
            str(processes),
        ]
        with self.console.open("ab") as console:
            child = Child(
                subprocess.Popen(
                    ["nice", "-n", str(nice), *supervisor, *command],
                    stdin=subprocess.PIPE,
                    stdout=console,
                    stderr=console,
                    env=environment,
                    start_new_session=True,
                )
            )
        try:
            yield child
        finally:
            child.stop()

    def tidy(self) -> None:
        """Keep the student and what tells of its making; let checkpoints and caches go."""
        for name in ("checkpoints", "best", "embeddings", "images", ".speed"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def remove(self) -> None:
        """Let all of it go."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


class Child:
    """A run's process under its supervisor."""

    def __init__(self, supervisor: subprocess.Popen[bytes]) -> None:
        self._supervisor = supervisor

    @property
    def pid(self) -> int:
        """Of the supervisor, and of the group of all that it started."""
        return self._supervisor.pid

    def status(self) -> int | None:
        """None while it runs; then its exit status, 128 + N where signal N ended it."""
        status = self._supervisor.poll()
        if status is None or status >= 0:
            return status
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # a supervisor that was killed leaves its command behind
        return 128 - status

    def stop(self) -> int:
        """Let go, and wait until it has written its checkpoint and left; its status."""
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()
        self._supervisor.wait()
        status = self.status()
        assert status is not None
        return status


def environment(devices: Sequence[str]) -> dict[str, str]:
    """This process's environment with the devices of jobs alone in sight, GPUs by their numbers in ours."""
    numbers = [device.removeprefix("cuda:") for device in devices if device != "cpu"]
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    if own is not None:
        visible = own.split(",")
        numbers = [visible[int(number)] for number in numbers]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SERVICE_")}  # holds secrets
    own_choice = {"CUDA_VISIBLE_DEVICES": ",".join(numbers), "ACCELERATE_USE_CPU": str(not numbers)}
    return {**inherited, **own_choice, "HF_HUB_OFFLINE": "1"}


def _parsed(kind: Kind, lines: Iterable[bytes]) -> Iterator[LogLine]:
    """Lines of a log; one that is none, as a killed writer leaves it, is passed over."""
    for line in lines:
        try:
            values = json.loads(line, parse_constant=lambda _: None, parse_float=_finite)  # NaN is not JSON
            told = kind != "alarm" or (isinstance(values["name"], str) and isinstance(values["says"], str))
            if told and isinstance(values["images"], int) and 0 <= values["images"] < 2**63:
                yield LogLine(kind, values["images"], values)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue


def _finite(text: str) -> float | None:
    """A number of JSON; None for one that is too large for a float."""
    number = float(text)
    return number if math.isfinite(number) else None
