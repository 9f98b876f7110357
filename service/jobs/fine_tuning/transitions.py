"""Changes of a job's status, in the caller's transaction, each with its event."""

from sqlalchemy.orm import Session

from service.jobs.fine_tuning.events import record_event
from service.jobs.tables import PAUSE, JobRow


def start(session: Session, name: str, number: int) -> JobRow | None:
    """Return the job as running; None if it is not queued or this is not its start of that number."""
    job = session.get(JobRow, name, with_for_update=True)
    if job is None or job.starts != number or job.status not in ("queued", "running"):
        return None
    if job.status == "queued":
        job.status = "running"
        record_event(session, job, "The job is running." if number == 0 else "The job is running again.")
    return job


def queue(session: Session, job: JobRow) -> JobRow:
    """Queue a validated job, unless it has ended or was paused meanwhile."""
    if job.status == "validating_files":
        job.status = "queued"
        record_event(session, job, "The job is queued.")
    return job


def pause(session: Session, job: JobRow) -> bool:
    """Pause a job if that is still requested."""
    if job.requested_action != PAUSE:
        return False
    job.status, job.requested_action, job.estimated_finish = "paused", None, None
    record_event(session, job, f"The job is paused after {job.images_seen} images.")
    return True
