"""`FineTuningJobs`: creates, lists, pauses, resumes, cancels and deletes jobs for clients."""

import logging
import secrets
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from service.errors import Forbidden, InvalidRequest, NotFound, Overloaded, ServiceError, excerpt, quoted
from service.jobs.database import Database
from service.jobs.file_store import FileStore
from service.jobs.fine_tuning.choices import budget_warning, check_configuration, check_names
from service.jobs.fine_tuning.commands import check_fetched, find_teacher, report_command
from service.jobs.fine_tuning.events import record_event
from service.jobs.fine_tuning.job_folder import READABLE
from service.jobs.fine_tuning.options import DistillationOptions
from service.jobs.fine_tuning.run_process import environment
from service.jobs.fine_tuning.workflow import FineTuningWorkflow
from service.jobs.rows import check_unfinished, index, may_be_id, new_id, owned, page
from service.jobs.schemas import JobRequest
from service.jobs.tables import CANCEL, DELETE, ENDED, PAUSE, FileRow, JobCheckpointRow, JobEventRow, JobRow
from service.setting_types import SHIPPED_TEACHER
from service.settings import Settings
from service.temporary_folders import temporary_folder

log = logging.getLogger(__name__)

MAX_PAIRS = 16  # of metadata
REPORT_SECONDS = 120
REPORT_RETRY_SECONDS = 5
KEPT = JobRow.requested_action.is_distinct_from(DELETE)  # the condition of jobs that clients see

Part = TypeVar("Part", JobEventRow, JobCheckpointRow)


class FineTuningJobs:
    """The jobs of all owners; each owner sees only its own. Every method blocks: call them off the event loop."""

    def __init__(self, database: Database, files: FileStore, workflow: FineTuningWorkflow, settings: Settings) -> None:
        self._database = database
        self._files = files
        self._workflow = workflow
        self._settings = settings
        self._reporting = threading.Lock()  # a report takes a process and a thread for seconds

    def create(self, owner: str, body: JobRequest, options: DistillationOptions) -> JobRow:
        """Add a job with options and start to validate its prompts.

        Raises InvalidRequest, NotFound or Overloaded, which name the field at fault.
        """
        teacher = find_teacher(self._settings.jobs.teachers, body.model)
        if options.preset is None and teacher != SHIPPED_TEACHER:
            raise InvalidRequest(
                "distillation.preset: name a preset, for example sd3-medium-lora; docs/distill.md lists them",
                "distillation.preset",
                "missing_required_parameter",
            )
        check_names(options)
        _check_budget(options, self._settings)
        _check_file(self._files.get(owner, body.training_file, int(time.time()), "training_file"))
        options = options.model_copy(update={"preset": options.preset or SHIPPED_TEACHER})
        check_configuration(options)
        check_fetched(teacher, body.model)
        job = JobRow(
            id=new_id("ftjob-"),
            owner=owner,
            status="validating_files",
            model=body.model,
            training_file=body.training_file,
            suffix=body.suffix,
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            hyperparameters={"batch_size": options.batch or "auto", "n_epochs": "auto"},
            distillation=options.model_dump(exclude_none=True),
            details=body.metadata,
            result_files=[],
            created_at=int(time.time()),
            images_total=options.images,
        )
        with self._database.begin(owner) as session:
            limit = self._settings.jobs.max_jobs_per_key
            check_unfinished(session, JobRow, owner, limit, retry_after=600, code="job_quota_exceeded")
            session.add(job)
            session.flush()
            record_event(session, job, f"Validating the file {body.training_file}.")
            if warning := budget_warning(options):
                record_event(session, job, warning, "warn")
        self._workflow.begin(job)
        return job

    def get(self, owner: str, name: str) -> JobRow:
        """Return a job of this owner. Raises NotFound."""
        with self._database.read() as session:
            return owned(session, JobRow, owner, name, "job_id", KEPT)

    def phase(self, job: JobRow) -> str | None:
        """Return what a running job does."""
        return self._workflow.folder(job).phase() if job.status == "running" else None

    def index(
        self, owner: str, after: str | None, limit: int, metadata: dict[str, str] | None = None
    ) -> tuple[Sequence[JobRow], bool]:
        """Return a page of jobs with these metadata, newest first, and whether there are more."""
        conditions: list[Any] = [KEPT]
        pairs = metadata or {}
        if len(pairs) > MAX_PAIRS or "\0" in "".join([*pairs, *pairs.values()]):
            message = f"metadata: a job has {MAX_PAIRS} pairs at most, none with the character U+0000"
            raise InvalidRequest(message, "metadata", "invalid_value")
        for key, value in pairs.items():
            # Not a JSON path, whose syntax cannot express every key.
            unfold = func.json_each if self._database.is_sqlite else func.json_each_text
            pair = unfold(JobRow.details).table_valued("key", "value")
            conditions.append(exists().where(pair.c.key == key, pair.c.value == value))
        with self._database.read() as session:
            return index(session, JobRow, owner, after, limit, *conditions)

    def events(self, owner: str, name: str, after: str | None, limit: int) -> tuple[Sequence[JobEventRow], bool]:
        """Return a page of the events of a job, newest first, and whether there are more."""
        return self._parts(JobEventRow, JobEventRow.number, owner, name, after, limit)

    def checkpoints(
        self, owner: str, name: str, after: str | None, limit: int
    ) -> tuple[Sequence[JobCheckpointRow], bool]:
        """Return a page of the checkpoints of a job, newest first, and whether there are more."""
        return self._parts(JobCheckpointRow, JobCheckpointRow.step_number, owner, name, after, limit)

    def _parts(
        self, kind: type[Part], number: Any, owner: str, name: str, after: str | None, limit: int
    ) -> tuple[Sequence[Part], bool]:
        with self._database.read() as session:
            job = owned(session, JobRow, owner, name, "job_id", KEPT)
            parts = select(kind).where(kind.job_id == job.id)
            start = None
            if after is not None:
                start = session.scalar(parts.where(kind.id == after)) if may_be_id(after) else None
                if start is None:
                    raise NotFound(f"there is no {quoted(after)} in this job", "after")
            return page(session, parts, [number], start, limit)

    def sample(self, owner: str, name: str) -> Path:
        """Return the newest grid of sample images, a PNG. Raises NotFound."""
        found = self._workflow.folder(self.get(owner, name)).newest_sample()
        if found is None:
            raise NotFound(f"the job {name!r} has no sample images yet", "job_id", "no_sample")
        return found

    def log(self, owner: str, name: str) -> str:
        """Return what a job's processes have printed. Raises NotFound."""
        job = self.get(owner, name)
        text = self._workflow.folder(job).log()
        if text is None:
            raise NotFound(f"the job {name!r} has no log yet", "job_id", "no_log")
        return self._without_teacher(job, text)

    def report(self, owner: str, name: str) -> str:
        """Return the report of a job's run, an HTML page that is written for the call.

        Raises NotFound before the run has started, Overloaded while another report is written, and ServiceError if the
        report cannot be written.
        """
        job = self.get(owner, name)
        folder = self._workflow.folder(job)
        if not folder.has_run():
            raise NotFound(f"the job {name!r} has no report yet: its run has not started", "job_id", "no_report")
        if not self._reporting.acquire(blocking=False):
            raise Overloaded("the server is writing another report", REPORT_RETRY_SECONDS, "report_in_progress")
        try:
            return self._without_teacher(job, folder.without_path(self._write_report(name, folder.run)))
        finally:
            self._reporting.release()

    def _write_report(self, name: str, run: Path) -> str:
        """Return the report of a run, written by `distill report`. Raises ServiceError."""
        with temporary_folder("fgm-report-") as place:
            page = Path(place) / "report.html"
            try:
                subprocess.run(
                    report_command(run, page),
                    env=environment(["cpu"]),
                    capture_output=True,
                    text=True,
                    timeout=REPORT_SECONDS,
                    check=True,
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                log.warning("the report of %s cannot be written: %s %s", name, error, error.stderr or "")
                raise ServiceError(
                    f"the report of the job {name!r} cannot be written; the server's log says why"
                ) from error
            return page.read_text(encoding="utf-8")

    def _without_teacher(self, job: JobRow, text: str) -> str:
        """Return a text with the name of the job's teacher in place of its folder on this server."""
        teacher = self._settings.jobs.teachers.get(job.model, "")
        return text.replace(teacher, job.model) if Path(teacher).is_absolute() else text

    def delete(self, owner: str, name: str, now: int) -> None:
        """Delete a job that has ended, with its student, log and samples. Its files are removed a minute later.

        Raises NotFound, and InvalidRequest for an unfinished job.
        """
        with self._database.begin() as session:
            job = owned(session, JobRow, owner, name, "job_id", KEPT, lock=True)
            if job.status not in ENDED:
                raise InvalidRequest(f"the job is {job.status}; cancel it first", "job_id", "job_not_ended")
            job.requested_action, job.deleted_at = DELETE, now

    def cancel(self, owner: str, name: str) -> JobRow:
        """Cancel a job: at once, or, if it is running, when its process has exited."""
        with self._database.begin() as session:
            job = _unfinished(session, owner, name)
            if job.status == "running":
                job.requested_action = CANCEL
            else:
                self._workflow.end(session, job, "cancelled", "The job is cancelled.")
        if job.status == "cancelled":
            self._workflow.folder(job).remove()
        return job

    def pause(self, owner: str, name: str) -> JobRow:
        """Pause a job. A running one first writes a checkpoint and exits."""
        with self._database.begin() as session:
            job = _unfinished(session, owner, name)
            if job.status == "running":
                job.requested_action = job.requested_action or PAUSE
            elif job.status != "paused":
                job.status = "paused"
                record_event(session, job, "The job is paused.")
        return job

    def resume(self, owner: str, name: str) -> JobRow:
        """Queue a paused job again."""
        with self._database.begin() as session:
            job = _unfinished(session, owner, name)
            if job.requested_action == PAUSE:
                job.requested_action = None
            if job.status == "paused":
                job.status = "queued"
                job.starts += 1
                record_event(session, job, "The job is queued again.")
        self._workflow.begin(job)
        return job

    def delete_student(self, owner: str, name: str, now: int) -> bool:
        """Unload a student, and remove it a minute later. Returns False if no job has made a student of this name.

        Raises Forbidden if it has another owner.
        """
        with self._database.begin() as session:
            made = select(JobRow).where(
                JobRow.fine_tuned_model == name, JobRow.status == "succeeded", JobRow.deleted_at.is_(None)
            )
            job = session.scalar(made.with_for_update())
            if job is None:
                return False
            if job.owner != owner:
                raise Forbidden("this student belongs to another API key", "model", "not_your_model")
            job.deleted_at = now
            record_event(session, job, "The student is deleted.")
        return True


def _check_budget(options: DistillationOptions, settings: Settings) -> None:
    """Raise InvalidRequest for a budget over the server's limits, or of a kind that is not allowed."""
    budgets = (
        ("images", options.images, settings.jobs.max_images_per_job),
        ("seconds", options.seconds, settings.jobs.max_seconds_per_job),
    )
    allowed = " or ".join(f"distillation.{kind} up to {most:.15g}" for kind, _, most in budgets if most is not None)
    if not allowed:
        return
    if options.images is None and options.seconds is None:
        message = f"distillation: this server limits the budget of a job; give {allowed}"
        raise InvalidRequest(message, "distillation", "missing_required_parameter")
    for kind, given, most in budgets:
        if given is not None and (most is None or given > most):
            message = f"distillation.{kind}: {given:.15g} is over the limit of this server; give {allowed}"
            raise InvalidRequest(message, f"distillation.{kind}", "job_budget_exceeded")
    if options.batch is not None and options.batch > (options.images or 0):  # a step is always a whole batch
        message = "distillation.batch: a batch must fit into the budget in images; give a smaller one, or leave it out"
        raise InvalidRequest(message, "distillation.batch", "job_budget_exceeded")


def _check_file(file: FileRow) -> None:
    """Raise InvalidRequest for a file that cannot hold prompts."""
    if file.purpose != "fine-tune":
        message = f"{file.id} was uploaded for {file.purpose!r}; upload it with purpose 'fine-tune'"
        raise InvalidRequest(message, "training_file", "invalid_purpose")
    if Path(file.filename).suffix.lower() not in READABLE:
        message = f"{excerpt(file.filename)} has no ending of a file of prompts; it must end in {', '.join(READABLE)}"
        raise InvalidRequest(message, "training_file", "invalid_file_type")


def _unfinished(session: Session, owner: str, name: str) -> JobRow:
    """Return an unfinished job of this owner, with a lock on its row. Raises NotFound or InvalidRequest."""
    job = owned(session, JobRow, owner, name, "job_id", KEPT, lock=True)
    if job.status in ENDED:
        raise InvalidRequest(f"the job has {job.status} already", "job_id", "job_ended")
    return job
