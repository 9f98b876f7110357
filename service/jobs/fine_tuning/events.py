"""Records events and checkpoints of a job. The caller holds a lock on the job's row."""

import time
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.jobs.fine_tuning.run_log import LogLine
from service.jobs.tables import JobCheckpointRow, JobEventRow, JobRow

Level = Literal["info", "warn", "error"]


def record_event(session: Session, job: JobRow, message: str, level: Level = "info") -> None:
    """Add a message to the events of a job."""
    number = _last_number(session, job) + 1
    session.add(_event(job, number, str(number), message, level))
    session.flush()


def record_log_lines(session: Session, job: JobRow, lines: Sequence[LogLine]) -> None:
    """Add lines of a run's logs as events, each once. The metrics of an evaluation are also added to its checkpoint.

    Pass some lines at a time, because the row is locked meanwhile.
    """
    named: dict[str, LogLine] = {}
    for line in lines:
        named.setdefault(_event_id(job, line.key), line)
    known = set(session.scalars(select(JobEventRow.id).where(JobEventRow.id.in_(named))))
    new = [line for event_id, line in named.items() if event_id not in known]
    for number, line in enumerate(new, _last_number(session, job) + 1):
        job.images_seen = max(job.images_seen, line.images)
        session.add(_line_event(job, number, line))
        if line.kind == "evaluation":
            _add_to_checkpoint(session, job, line)
    session.flush()


def record_checkpoint(session: Session, job: JobRow, images: int, metrics: dict[str, Any]) -> None:
    """Add a checkpoint with the metrics of its time, unless it is recorded already."""
    checkpoint_id = _checkpoint_id(job, images)
    if session.get(JobCheckpointRow, checkpoint_id) is None:
        job.images_seen = max(job.images_seen, images)
        checkpoint = JobCheckpointRow(
            id=checkpoint_id,
            job_id=job.id,
            step_number=images,
            created_at=int(time.time()),
            model=f"{job.student}:ckpt-step-{images}",
            metrics={"step": images, **metrics},
        )
        session.add(checkpoint)


def _line_event(job: JobRow, number: int, line: LogLine) -> JobEventRow:
    if line.kind == "alarm":
        return _event(job, number, line.key, f"Alarm {line.values['name']}: {line.values['message']}", "warn")
    metrics = {"step": line.images, "total_steps": job.images_total, **line.values}
    message = "Student evaluated" if line.kind == "evaluation" else "Images seen"
    return _event(job, number, line.key, f"{message}: {line.images} of {job.images_total}", data=metrics)


def _event(
    job: JobRow, number: int, key: str, message: str, level: Level = "info", data: dict[str, Any] | None = None
) -> JobEventRow:
    """Return an event whose id follows from `key`. It is a `metrics` event if it has data."""
    return JobEventRow(
        id=_event_id(job, key),
        job_id=job.id,
        number=number,
        created_at=int(time.time()),
        level=level,
        type="metrics" if data else "message",
        message=message,
        data=data,
    )


def _add_to_checkpoint(session: Session, job: JobRow, evaluation: LogLine) -> None:
    """Add an evaluation to its checkpoint, which is written before the student is evaluated."""
    checkpoint = session.get(JobCheckpointRow, _checkpoint_id(job, evaluation.images))
    if checkpoint is not None:
        metrics = {name: value for name, value in evaluation.values.items() if name != "images"}
        checkpoint.metrics = {**checkpoint.metrics, **metrics}


def _last_number(session: Session, job: JobRow) -> int:
    return session.scalar(select(func.max(JobEventRow.number)).where(JobEventRow.job_id == job.id)) or 0


def _event_id(job: JobRow, key: str) -> str:
    return f"ftevent-{job.stem}-{key}"


def _checkpoint_id(job: JobRow, images: int) -> str:
    return f"ftckpt-{job.stem}-{images}"
