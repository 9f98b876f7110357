"""What a run has told, written down for its job's clients: events, checkpoints with their figures, and when it ends."""

import time
from collections.abc import Callable
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.jobs.runs import Line
from service.jobs.tables import Job, JobCheckpoint, JobEvent

Level = Literal["info", "warn", "error"]


class Pace:
    """When a run will have seen its images, at the speed since this process began to watch it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[float, int] | None = None

    def finish(self, seen: int, total: int | None) -> int | None:
        """Seconds since 1970; None while it cannot be known."""
        if not seen or total is None:
            return None
        if self._began is None:
            self._began = self._clock(), seen
        seconds, images = self._clock() - self._began[0], seen - self._began[1]
        return int(time.time() + seconds * (total - seen) / images) if images > 0 else None


def tell(
    session: Session,
    job: Job,
    message: str,
    level: Level = "info",
    data: dict[str, Any] | None = None,
    key: str | None = None,
) -> None:
    """Add an event to a job, with figures if it has `data`; one with a `key` only once.

    The caller holds the job's row, so that no two events get one number.
    """
    number = (session.scalar(select(func.max(JobEvent.number)).where(JobEvent.job_id == job.id)) or 0) + 1
    name = f"ftevent-{job.stem}-{key or number}"
    if session.get(JobEvent, name) is None:
        event = JobEvent(
            id=name,
            job_id=job.id,
            number=number,
            created_at=int(time.time()),
            level=level,
            type="metrics" if data else "message",
            message=message,
            data=data,
        )
        session.add(event)
        session.flush()


def note_line(session: Session, job: Job, line: Line) -> None:
    """Tell of a line of a run's logs; the figures of an evaluation join the checkpoint of their time."""
    job.images_seen = max(job.images_seen, line.images)
    if line.kind == "alarm":
        tell(session, job, f"Alarm, {line.values['name']}: {line.values['says']}", "warn", key=line.key)
        return
    figures = {"step": line.images, "total_steps": job.images_total, **line.values}
    message = "The student was judged" if line.kind == "evaluation" else "Images seen"
    tell(session, job, f"{message}: {line.images} of {job.images_total}", data=figures, key=line.key)
    kept = session.get(JobCheckpoint, _checkpoint_name(job, line.images))
    if line.kind == "evaluation" and kept is not None:  # a student is judged after its checkpoint is written
        kept.metrics = {**kept.metrics, **{name: value for name, value in line.values.items() if name != "images"}}


def note_checkpoint(session: Session, job: Job, images: int, figures: dict[str, Any]) -> None:
    """List a checkpoint with what is known of the student then; one that is listed stays as it is."""
    name = _checkpoint_name(job, images)
    if session.get(JobCheckpoint, name) is None:
        job.images_seen = max(job.images_seen, images)
        checkpoint = JobCheckpoint(
            id=name,
            job_id=job.id,
            step_number=images,
            created_at=int(time.time()),
            model=f"{job.student}:ckpt-step-{images}",
            metrics={"step": images, **figures},
        )
        session.add(checkpoint)


def _checkpoint_name(job: Job, images: int) -> str:
    return f"ftckpt-{job.stem}-{images}"
