"""The state of a run, as the run records it in its folder, so that a copied folder has the same state."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from distill.files import atomic_write_text

STATE = "state.json"
Phase = Literal["prepared", "encoding", "sampling", "training", "interrupted", "failed", "finished", "ended early"]


@dataclass(frozen=True)
class RunState:
    """`images` that a run had seen of its `budget` when it recorded its phase, at `time` in Unix seconds.

    A phase of encoding, sampling the teacher or training without a live process is that of a run that was killed.
    """

    phase: Phase
    images: int
    budget: int
    time: float

    @property
    def is_final(self) -> bool:
        """Whether the run had exported its student."""
        return self.phase in ("finished", "ended early")


def write_state(out: Path, phase: Phase, images: int, budget: int) -> None:
    """Record the state of a run."""
    atomic_write_text(out / STATE, json.dumps(asdict(RunState(phase, images, budget, time.time()))) + "\n")


def read_state(out: Path) -> RunState | None:
    """Read the state of a run; None if none was recorded or it cannot be read."""
    try:
        values = json.loads((out / STATE).read_text(encoding="utf-8"))
        return RunState(str(values["phase"]), int(values["images"]), int(values["budget"]), float(values["time"]))  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
