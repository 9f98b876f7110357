"""Distillation jobs as clients ask for them: made, listed, paused and ended."""

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from service.errors import Forbidden, InvalidRequest, NotFound, Overloaded, excerpt, quoted
from service.jobs.database import Database
from service.jobs.file_store import FileStore, new_id, page
from service.jobs.fine_tuning.events import record_event
from service.jobs.fine_tuning.options import DistillationOptions, find_teacher
from service.jobs.fine_tuning.run_folder import READABLE
from service.jobs.fine_tuning.workflow import FineTuningWorkflow
from service.jobs.tables import ENDED, FileRow, JobCheckpointRow, JobEventRow, JobRow
from service.settings import SHIPPED_TEACHER, Settings

MAX_PAIRS = 16  # of metadata

Part = TypeVar("Part", JobEventRow, JobCheckpointRow)


class FineTuningJobs:
    """The jobs of all owners; each sees only its own. Every method blocks: call them off the event loop."""

    def __init__(self, database: Database, files: FileStore, workflow: FineTuningWorkflow, settings: Settings) -> None:
        self._database = database
        self._files = files
        self._workflow = workflow
        self._settings = settings

    def create(
        self,
        owner: str,
        model: str,
        training_file: str,
        asked: DistillationOptions,
        suffix: str | None,
        seed: int | None,
        metadata: dict[str, str] | None,
    ) -> JobRow:
        """A new job, whose prompts are read before it waits for its turn.

        Raises InvalidRequest, NotFound or Overloaded, which name the field at fault.
        """
        teacher = find_teacher(self._settings.jobs.teachers, model)
        if asked.preset is None and teacher != SHIPPED_TEACHER:
            raise InvalidRequest(
                "distillation.preset: say which, for example sd3-medium-lora; docs/distill.md tells of them",
                "distillation.preset",
                "missing_required_parameter",
            )
        _check_budget(asked, self._settings)
        _check_file(self._files.get(owner, training_file, int(time.time()), "training_file"))
        asked = asked.model_copy(update={"preset": asked.preset or SHIPPED_TEACHER})
        job = JobRow(
            id=new_id("ftjob-"),
            owner=owner,
            status="validating_files",
            model=model,
            training_file=training_file,
            suffix=suffix,
            seed=secrets.randbelow(2**31) if seed is None else seed,
            hyperparameters={"batch_size": asked.batch or "auto", "n_epochs": "auto"},
            distillation=asked.model_dump(exclude_none=True),
            details=metadata,
            result_files=[],
            created_at=int(time.time()),
            starts=0,
            images_seen=0,
            images_total=asked.images,
        )
        with self._database.begin(owner) as session:
            unfinished = select(func.count()).where(JobRow.owner == owner, JobRow.status.not_in(ENDED))
            if (session.scalar(unfinished) or 0) >= self._settings.jobs.max_jobs_per_key:
                raise Overloaded(
                    f"you have {self._settings.jobs.max_jobs_per_key} jobs that have not ended, which is the limit; "
                    "wait for one, or cancel one",
                    retry_after=600,
                    code="job_quota_exceeded",
                )
            session.add(job)
            session.flush()
            record_event(session, job, f"The file {training_file} is read.")
        self._workflow.begin(job)
        return job

    def get(self, owner: str, name: str) -> JobRow:
        """A job of this owner. Raises NotFound."""
        with self._database.read() as session:
            return _owned(session, owner, name)

    def index(
        self, owner: str, after: str | None, limit: int, metadata: dict[str, str] | None = None
    ) -> tuple[Sequence[JobRow], bool]:
        """Jobs of this owner with these metadata, the newest first, and whether there are more."""
        rows = select(JobRow).where(JobRow.owner == owner)
        asked = metadata or {}
        if len(asked) > MAX_PAIRS or "\0" in "".join([*asked, *asked.values()]):
            message = f"metadata: a job has {MAX_PAIRS} pairs at most, none with the character U+0000"
            raise InvalidRequest(message, "metadata", "invalid_value")
        for key, value in asked.items():
            # Not by a path to the key: that has a grammar of its own, in which some keys cannot be said.
            unfold = func.json_each if self._database.is_sqlite else func.json_each_text
            pair = unfold(JobRow.details).table_valued("key", "value")
            rows = rows.where(exists().where(pair.c.key == key, pair.c.value == value))
        with self._database.read() as session:
            start = None if after is None else _owned(session, owner, after, "after")
            found = session.scalars(page(rows, JobRow, start, "desc", limit)).all()
        return found[:limit], len(found) > limit

    def events(self, owner: str, name: str, after: str | None, limit: int) -> tuple[Sequence[JobEventRow], bool]:
        """What a job has told, the newest first, and whether there is more."""
        with self._database.read() as session:
            _owned(session, owner, name)
            start = None if after is None else _part(session, JobEventRow, after, name).number
            return _newest(session, JobEventRow, name, JobEventRow.number, start, limit)

    def checkpoints(
        self, owner: str, name: str, after: str | None, limit: int
    ) -> tuple[Sequence[JobCheckpointRow], bool]:
        """The checkpoints that a job has written, the newest first, and whether there are more."""
        with self._database.read() as session:
            _owned(session, owner, name)
            start = None if after is None else _part(session, JobCheckpointRow, after, name).step_number
            return _newest(session, JobCheckpointRow, name, JobCheckpointRow.step_number, start, limit)

    def sample(self, owner: str, name: str) -> Path:
        """The newest grid of a job's images, a PNG. Raises NotFound."""
        found = self._workflow.folder(self.get(owner, name)).newest_sample()
        if found is None:
            raise NotFound(f"the job {name!r} has drawn nothing yet", "job_id", "no_sample")
        return found

    def cancel(self, owner: str, name: str) -> JobRow:
        """End a job for good: at once, or, where it runs, when its process has left."""
        with self._database.begin() as session:
            job = _unfinished(session, owner, name)
            if job.status == "running":
                job.requested_action = "cancel"
            else:
                self._workflow.end(session, job, "cancelled", "The job is cancelled.")
        if job.status == "cancelled":
            self._workflow.folder(job).remove()
        return job

    def pause(self, owner: str, name: str) -> JobRow:
        """Keep a job from running, or let it write a checkpoint and leave."""
        with self._database.begin() as session:
            job = _unfinished(session, owner, name)
            if job.status == "running":
                job.requested_action = job.requested_action or "pause"
            elif job.status != "paused":
                job.status = "paused"
                record_event(session, job, "The job is paused.")
        return job

    def resume(self, owner: str, name: str) -> JobRow:
        """Let a paused job go on."""
        with self._database.begin() as session:
            job = _unfinished(session, owner, name)
            if job.requested_action == "pause":
                job.requested_action = None
            if job.status == "paused":
                job.status = "queued"
                job.starts += 1
                record_event(session, job, "The job waits for its turn again.")
        self._workflow.begin(job)
        return job

    def delete_student(self, owner: str, name: str, now: int) -> bool:
        """Serve a student no more and remove it a minute later; False where no job made one of this name.

        Raises Forbidden for another owner's.
        """
        with self._database.begin() as session:
            made = select(JobRow).where(
                JobRow.fine_tuned_model == name, JobRow.status == "succeeded", JobRow.deleted_at.is_(None)
            )
            job = session.scalar(made.with_for_update())
            if job is None:
                return False
            if job.owner != owner:
                raise Forbidden("this student is of another API key's job", "model", "not_your_model")
            job.deleted_at = now
            record_event(session, job, "The student is deleted.")
        return True


def _check_budget(asked: DistillationOptions, settings: Settings) -> None:
    """Raise InvalidRequest for a budget beyond the server's bounds, or of a kind that has none while the other has."""
    budgets = (
        ("images", asked.images, settings.jobs.max_images_per_job),
        ("seconds", asked.seconds, settings.jobs.max_seconds_per_job),
    )
    allowed = " or ".join(f"distillation.{kind} up to {most:.15g}" for kind, _, most in budgets if most is not None)
    if not allowed:
        return
    if asked.images is None and asked.seconds is None:
        message = f"distillation: this server bounds the budget of a job; give {allowed}"
        raise InvalidRequest(message, "distillation", "missing_required_parameter")
    for kind, given, most in budgets:
        if given is not None and (most is None or given > most):
            message = f"distillation.{kind}: {given:.15g} is beyond what this server allows; give {allowed}"
            raise InvalidRequest(message, f"distillation.{kind}", "job_budget_exceeded")
    if asked.batch is not None and asked.batch > (asked.images or 0):  # a step is never cut
        message = "distillation.batch: a step is whole, so it must be within the budget in images; leave the preset's"
        raise InvalidRequest(message, "distillation.batch", "job_budget_exceeded")


def _check_file(file: FileRow) -> None:
    """Raise InvalidRequest for a file that cannot be a job's prompts."""
    if file.purpose != "fine-tune":
        message = f"{file.id} was uploaded for {file.purpose!r}; upload it with purpose 'fine-tune'"
        raise InvalidRequest(message, "training_file", "invalid_purpose")
    if Path(file.filename).suffix.lower() not in READABLE:
        message = f"{excerpt(file.filename)} is no file of prompts by its name; it must end in {', '.join(READABLE)}"
        raise InvalidRequest(message, "training_file", "invalid_file_type")


def _owned(session: Session, owner: str, name: str, param: str = "job_id", lock: bool = False) -> JobRow:
    """A job of this owner, its row locked if it is to be changed. Raises NotFound."""
    job = session.get(JobRow, name, with_for_update=lock) if name.isascii() and name.isprintable() else None
    if job is None or job.owner != owner:
        raise NotFound(f"there is no job {quoted(name)}", param, "job_not_found")
    return job


def _unfinished(session: Session, owner: str, name: str) -> JobRow:
    """A job of this owner to be changed, its row locked. Raises NotFound, or InvalidRequest for one that has ended."""
    job = _owned(session, owner, name, lock=True)
    if job.status in ENDED:
        raise InvalidRequest(f"the job has {job.status} already", "job_id", "job_ended")
    return job


def _part(session: Session, kind: type[Part], name: str, job: str) -> Part:
    """An event or checkpoint of a job. Raises NotFound."""
    found = session.get(kind, name) if name.isascii() and name.isprintable() else None
    if found is None or found.job_id != job:
        raise NotFound(f"there is no {quoted(name)} in this job", "after")
    return found


def _newest(
    session: Session, kind: type[Part], job: str, number: Any, before: int | None, limit: int
) -> tuple[Sequence[Part], bool]:
    rows = select(kind).where(kind.job_id == job).order_by(number.desc()).limit(limit + 1)
    found = session.scalars(rows if before is None else rows.where(number < before)).all()
    return found[:limit], len(found) > limit
