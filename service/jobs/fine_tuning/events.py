"""What a run has told, written down for its job's clients: events, checkpoints with their metrics, and when it ends."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.jobs.fine_tuning.run_folder import LogLine
from service.jobs.tables import JobCheckpointRow, JobEventRow, JobRow

Level = Literal["info", "warn", "error"]


class EtaEstimator:
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


def record_event(session: Session, job: JobRow, message: str, level: Level = "info") -> None:
    """Add an event to a job. The caller holds the job's row, so that no two events get one number."""
    number = _last_number(session, job) + 1
    session.add(_event(job, number, str(number), message, level))
    session.flush()


def record_log_lines(session: Session, job: JobRow, lines: Sequence[LogLine]) -> None:
    """Tell of lines of a run's logs, each once; the metrics of an evaluation join the checkpoint of their time.

    The caller holds the job's row, so give it some at a time.
    """
    named: dict[str, LogLine] = {}
    for line in lines:
        named.setdefault(_event_name(job, line.key), line)
    known = set(session.scalars(select(JobEventRow.id).where(JobEventRow.id.in_(named))))
    fresh = [line for name, line in named.items() if name not in known]
    for number, line in enumerate(fresh, _last_number(session, job) + 1):
        job.images_seen = max(job.images_seen, line.images)
        session.add(_line_event(job, number, line))
        if line.kind == "evaluation":
            _join(session, job, line)
    session.flush()


def _line_event(job: JobRow, number: int, line: LogLine) -> JobEventRow:
    if line.kind == "alarm":
        return _event(job, number, line.key, f"Alarm, {line.values['name']}: {line.values['says']}", "warn")
    metrics = {"step": line.images, "total_steps": job.images_total, **line.values}
    message = "The student was judged" if line.kind == "evaluation" else "Images seen"
    return _event(job, number, line.key, f"{message}: {line.images} of {job.images_total}", data=metrics)


def _join(session: Session, job: JobRow, judged: LogLine) -> None:
    """Add an evaluation to its checkpoint, if it is listed: a student is judged after its checkpoint is written."""
    kept = session.get(JobCheckpointRow, _checkpoint_name(job, judged.images))
    if kept is not None:
        kept.metrics = {**kept.metrics, **{name: value for name, value in judged.values.items() if name != "images"}}


def _last_number(session: Session, job: JobRow) -> int:
    return session.scalar(select(func.max(JobEventRow.number)).where(JobEventRow.job_id == job.id)) or 0


def _event_name(job: JobRow, key: str) -> str:
    return f"ftevent-{job.stem}-{key}"


def _event(
    job: JobRow, number: int, key: str, message: str, level: Level = "info", data: dict[str, Any] | None = None
) -> JobEventRow:
    """An event that is known again by its `key`, of metrics if it has `data`."""
    return JobEventRow(
        id=_event_name(job, key),
        job_id=job.id,
        number=number,
        created_at=int(time.time()),
        level=level,
        type="metrics" if data else "message",
        message=message,
        data=data,
    )


def record_checkpoint(session: Session, job: JobRow, images: int, metrics: dict[str, Any]) -> None:
    """List a checkpoint with what is known of the student then; one that is listed stays as it is."""
    name = _checkpoint_name(job, images)
    if session.get(JobCheckpointRow, name) is None:
        job.images_seen = max(job.images_seen, images)
        checkpoint = JobCheckpointRow(
            id=name,
            job_id=job.id,
            step_number=images,
            created_at=int(time.time()),
            model=f"{job.student}:ckpt-step-{images}",
            metrics={"step": images, **metrics},
        )
        session.add(checkpoint)


def _checkpoint_name(job: JobRow, images: int) -> str:
    return f"ftckpt-{job.stem}-{images}"
