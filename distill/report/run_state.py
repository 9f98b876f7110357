"""The state of a run, as the run records it in its folder, so that a copied folder has the same state."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from distill.files import atomic_write_text

STATE = "state.json"
Phase = Literal["prepared", "encoding", "sampling", "training", "interrupted", "failed", "finished", "ended early"]


@dataclass(frozen=True)
class RunState:
    """`images` that a run had seen of its `budget` when it recorded its phase, at `time` in Unix seconds.

    `seconds` is the wall time of the run until then, of all its sessions: encoding, training, evaluations, checkpoints.

    A phase of encoding, sampling the teacher or training without a live process is that of a run that was killed.
    """

    phase: Phase
    images: int
    budget: int
    time: float
    seconds: float = 0.0

    @property
    def is_final(self) -> bool:
        """Whether the run had exported its student."""
        return self.phase in ("finished", "ended early")


class StateRecorder:
    """Records the state of a run in its folder, with the wall time of this session and all earlier ones.

    The run keeps `images` and `budget` up to date.
    """

    def __init__(self, out: Path, budget: int) -> None:
        """`out` is the run folder, whose recorded state has the time of earlier sessions."""
        self.images, self.budget = 0, budget
        self._out = out
        earlier = read_state(out)
        self._earlier = 0.0 if earlier is None else earlier.seconds
        self._began = time.monotonic()

    def record(self, phase: Phase) -> None:
        """Record the state in this phase."""
        write_state(self._out, phase, self.images, self.budget, self._earlier + time.monotonic() - self._began)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Record a phase, and its interruption or failure, unless the folder is gone or the disk is full."""
        self.record(phase)
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, GeneratorExit | KeyboardInterrupt | SystemExit)
            if self._out.is_dir():
                with suppress(OSError):
                    self.record("interrupted" if interrupted else "failed")
            raise


def write_state(out: Path, phase: Phase, images: int, budget: int, seconds: float = 0.0) -> None:
    """Record the state of a run."""
    atomic_write_text(out / STATE, json.dumps(asdict(RunState(phase, images, budget, time.time(), seconds))) + "\n")


def read_state(out: Path) -> RunState | None:
    """Read the state of a run; None if none was recorded or it cannot be read."""
    try:
        values = json.loads((out / STATE).read_text(encoding="utf-8"))
        phase, images, budget = str(values["phase"]), int(values["images"]), int(values["budget"])
        return RunState(phase, images, budget, float(values["time"]), float(values.get("seconds", 0)))  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
