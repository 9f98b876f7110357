"""The durable workflows of a distillation job: validate its prompts, then run `distill run` in its own process.

The row in `jobs` is the only state, and its `requested_action` says whether to pause or cancel. The same command
resumes a run, whatever stopped it. So a workflow that starts again, on this server or another, only reads the row and
runs the same command.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.files import DISK_FULL
from service.jobs.database import Database
from service.jobs.file_store import FileStore
from service.jobs.fine_tuning import transitions
from service.jobs.fine_tuning.commands import find_teacher, prompts_command, run_command
from service.jobs.fine_tuning.eta import EtaEstimator
from service.jobs.fine_tuning.events import Level, record_checkpoint, record_event, record_log_lines
from service.jobs.fine_tuning.failures import JobFailed, refusal
from service.jobs.fine_tuning.job_folder import JobFolder
from service.jobs.fine_tuning.options import DistillationOptions
from service.jobs.fine_tuning.run_process import environment, run_process
from service.jobs.fine_tuning.students import Students
from service.jobs.rows import file_row
from service.jobs.tables import CANCEL, DELETE, ENDED, PAUSE, FileRow, JobRow
from service.jobs.webhooks import Webhooks
from service.jobs.workflows import Workflows
from service.settings import Settings

T = TypeVar("T")

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
SIDE_BY_SIDE = 2  # files of prompts that one server validates at a time
DELETED_SECONDS = 60  # after which the files of a deleted student are removed; every server has unloaded it by then
REFUSED, CLAIMED = 2, 75  # exit statuses of `distill run`: an error that it names; another process uses the folder
LINES = 100  # of a run's logs that are recorded in one transaction
CRASHES = 3  # in a row, without progress between them, that fail a job


class FineTuningWorkflow:
    """Runs jobs, one at a time in this process. Every method blocks: call them off the event loop."""

    def __init__(
        self,
        database: Database,
        workflows: Workflows,
        files: FileStore,
        webhooks: Webhooks,
        students: Students,
        data: Path,
        settings: Settings,
    ) -> None:
        """Defines its workflows, so create it before they start. `data` is the data folder."""
        self._database = database
        self._workflows = workflows
        self._files = files
        self._webhooks = webhooks
        self._students = students
        self._data = data
        self._settings = settings
        self._devices = settings.jobs.devices.split(",")
        workflows.define("validation", self._validate, SIDE_BY_SIDE)
        workflows.define("distillation", self._run, side_by_side=1, runs=settings.jobs.devices != "none")

    def begin(self, job: JobRow) -> None:
        """Start the workflow of a new, queued or running job. A second call has no effect."""
        if job.status == "validating_files":
            self._workflows.begin("validation", f"{job.id}.files")
        else:
            self._workflows.begin("distillation", f"{job.id}.{job.starts}")

    def end(
        self,
        session: Session,
        job: JobRow,
        status: str,
        message: str,
        level: Level = "info",
        error: dict[str, str | None] | None = None,
    ) -> None:
        """Set the final status of a job in the caller's transaction, unless it has one already.

        If the job did not succeed, a student that it has made is no longer served.
        """
        if job.status in ENDED:
            return
        now = int(time.time())
        if status != "succeeded":
            job.fine_tuned_model = None
        job.status, job.error, job.requested_action = status, error, None
        job.finished_at, job.estimated_finish = now, None
        record_event(session, job, message, level)
        self._webhooks.announce(session, job.owner, f"fine_tuning.job.{status}", job.id, now)

    def folder(self, job: JobRow) -> JobFolder:
        return JobFolder.of(self._data, job.id)

    def begin_waiting(self, now: int) -> None:
        """Start the workflows of jobs that have none.

        Their server died before it could start them, or the backup of the workflows is older than that of the jobs.
        """
        unfinished = select(JobRow).where(JobRow.status.in_(("validating_files", "queued", "running")))
        with self._database.read() as session:
            jobs = list(session.scalars(unfinished))
        for job in jobs:
            self.begin(job)

    def remove_deleted(self, now: int) -> None:
        """Remove the files of students that were deleted more than a minute ago, and everything of deleted jobs."""
        gone = select(JobRow).where(JobRow.requested_action == DELETE, JobRow.deleted_at <= now - DELETED_SECONDS)
        with self._database.read() as session:
            jobs = list(session.scalars(gone))
        for job in jobs:
            self.folder(job).remove()
            with self._database.begin() as session:
                session.execute(delete(JobRow).where(JobRow.id == job.id))  # the database deletes events with it
        deleted = (JobRow.fine_tuned_model.is_not(None), JobRow.deleted_at <= now - DELETED_SECONDS)
        with self._database.read() as session:
            jobs = list(session.scalars(select(JobRow).where(*deleted)))
        for job in jobs:
            self.folder(job).remove_student()
            with self._database.begin() as session:
                session.get_one(JobRow, job.id, with_for_update=True).fine_tuned_model = None

    # Validation

    def _validate(self, key: str) -> None:
        """The workflow of a new job: copy its prompts, read them once, and queue the job."""
        name = key.partition(".")[0]
        job = self._find(JobRow, name)
        if job is not None and job.status == "validating_files":
            with self._fail_on_error(job):
                self._validate_prompts(job, self.folder(job))
            validated = self._update(job, transitions.queue)
            if validated.status == "queued":
                self.begin(validated)
            self._webhooks.begin_due(int(time.time()))
        self._clean_up(name)

    def _validate_prompts(self, job: JobRow, folder: JobFolder) -> None:
        """Raise JobFailed if `distill run` would refuse the prompts."""
        command = prompts_command(DistillationOptions.model_validate(job.distillation), self._prompts(job, folder))
        with run_process(command, environment(["cpu"]), self._settings.jobs.nice, folder.console) as process:
            while process.status() is None:
                self._workflows.wait(POLL_SECONDS)
            if process.status() == REFUSED:
                raise refusal(folder.error())

    def _prompts(self, job: JobRow, folder: JobFolder) -> Path:
        """Return the job's own copy of its prompts, which a client cannot delete. Raises JobFailed."""
        kept = folder.prompts()
        if kept is not None:
            return kept
        file = self._find(FileRow, job.training_file)
        try:
            if file is None:
                raise FileNotFoundError
            return folder.keep_prompts(self._files.path(file.id), Path(file.filename).suffix)
        except FileNotFoundError:
            message = f"the file {job.training_file} was deleted before the job started"
            raise JobFailed(message, "file_not_found", "training_file") from None

    # The run

    def _run(self, key: str) -> None:
        """The workflow of a queued job: run it until it ends or is paused."""
        name, _, start = key.partition(".")
        job = self._database.retry_transaction(
            lambda session: transitions.start(session, name, int(start)), self._workflows.stopping
        )
        if job is not None:
            with self._fail_on_error(job):
                self._distill(job, self.folder(job))
            self._webhooks.begin_due(int(time.time()))
        self._clean_up(name)

    def _distill(self, job: JobRow, folder: JobFolder) -> None:
        """Run the command until the job has ended or is paused. Raises JobFailed."""
        command = self._command(job, folder)
        crashes, furthest = 0, -1
        while True:
            status, stopped = self._run_once(job, folder, command)
            action = self._update(job, lambda session, row: row.requested_action)
            if action == CANCEL:
                self._update(job, lambda session, row: self.end(session, row, "cancelled", "The job is cancelled."))
                return
            if status == 0 and folder.has_student():
                self._succeed(job, folder)
                return
            if action == PAUSE and self._update(job, transitions.pause):
                return
            if status == REFUSED:
                raise refusal(folder.error())
            if status != CLAIMED and not stopped:
                seen = max([0, *folder.checkpoints()])
                crashes = 1 if seen > furthest else crashes + 1
                furthest = seen
                if crashes == CRASHES:
                    message = f"the run crashed {crashes} times after {seen} images: {folder.log_tail()}"
                    raise JobFailed(message, "run_crashed")
                crash = f"The run crashed with status {status}; it resumes from {seen} images."
                self._update(job, partial(record_event, message=crash, level="warn"))
            # The process of a dead server still uses the folder until it has written its checkpoint.
            self._workflows.wait(POLL_SECONDS)

    def _command(self, job: JobRow, folder: JobFolder) -> list[str]:
        """Return the command of the run. Raises JobFailed."""
        prompts = self._prompts(job, folder)
        try:
            teacher = find_teacher(self._settings.jobs.teachers, job.model)
        except NotFound as error:
            raise JobFailed(error.message, error.code or "model_not_found", error.param) from None
        options = DistillationOptions.model_validate(job.distillation)
        return run_command(options, teacher, prompts, job.seed, folder.run)

    def _run_once(self, job: JobRow, folder: JobFolder, command: Sequence[str]) -> tuple[int, bool]:
        """Run the command until it exits or a client requests an action. Returns its status, and whether one did."""
        eta, requested, devices = EtaEstimator(), False, self._devices
        nice, own = self._settings.jobs.nice, environment(devices)
        with run_process(command, own, nice, folder.console, len(devices)) as process:
            while process.status() is None and not (requested := self._record_progress(job, folder, eta)):
                self._workflows.wait(POLL_SECONDS)
            status = process.stop()
        self._record_progress(job, folder, eta)
        return status, requested

    def _record_progress(self, job: JobRow, folder: JobFolder, eta: EtaEstimator) -> bool:
        """Record new lines of the run's logs and new checkpoints. Returns whether a client requests an action.

        A server that takes over reads the logs from their beginning, so some lines are recorded at a time: meanwhile
        the row is locked, and with SQLite the database.
        """
        budget, checkpoints, lines = folder.budget(), folder.new_checkpoints(), folder.new_lines()

        def record_lines(session: Session, row: JobRow) -> None:
            row.images_total = budget or row.images_total
            record_log_lines(session, row, piece)

        while piece := list(islice(lines, LINES)):
            self._update(job, record_lines)
        # After the lines: an evaluation that is written from now on is added to its checkpoint with its own line.
        metrics = {images: folder.metrics(images) for images in checkpoints}

        def record_checkpoints(session: Session, row: JobRow) -> bool:
            row.images_total = budget or row.images_total
            for images in checkpoints:
                record_checkpoint(session, row, images, metrics[images])
            row.estimated_finish = eta.finish(row.images_seen, row.images_total)
            return row.requested_action is not None

        return self._update(job, record_checkpoints)

    # The end

    def _succeed(self, job: JobRow, folder: JobFolder) -> None:
        """Serve the student and write the results, then set the status."""
        results = f"file-{job.stem}"

        def add_student(session: Session, row: JobRow) -> None:
            row.fine_tuned_model = job.student

        def write_results() -> int:
            with self._files.writing(results) as file:
                return file.write(folder.results().encode())

        def end(session: Session, row: JobRow) -> None:
            if row.status not in ENDED:
                row.result_files = [results]
                filename, now = f"{job.id}_results.csv", int(time.time())
                session.add(file_row(results, row.owner, "fine-tune-results", filename, size, now))
            self.end(session, row, "succeeded", f"The student is {job.student}.")

        self._update(job, add_student)
        self._students.serve()
        size = self._workflows.step("results", write_results)
        self._update(job, end)

    @contextmanager
    def _fail_on_error(self, job: JobRow) -> Iterator[None]:
        """End the job as failed if the block raises."""
        try:
            yield
        except JobFailed as failed:
            self._fail(job, failed)
        except OSError as error:
            code = "disk_full" if error.errno in DISK_FULL else "storage_error"
            self._fail(job, JobFailed(f"the server cannot write the job's files: {error.strerror}", code))
        except Exception:
            log.exception("%s failed", job.id)
            self._fail(job, JobFailed(f"the server failed; its log has the error under {job.id}", "server_error"))

    def _fail(self, job: JobRow, failed: JobFailed) -> None:
        message = f"The job failed: {failed}"
        self._update(job, lambda session, row: self.end(session, row, "failed", message, "error", failed.error))

    def _clean_up(self, name: str) -> None:
        """Remove the files that an ended job does not need, also if a server died before it did so."""
        job = self._find(JobRow, name)
        if job is not None and job.status == "succeeded":
            self.folder(job).remove_checkpoints()
        elif job is not None and job.status == "cancelled":
            self.folder(job).remove()

    def _find(self, kind: type[T], key: str) -> T | None:
        work = self._database.retry_transaction
        return work(lambda session: session.get(kind, key), self._workflows.stopping, read=True)

    def _update(self, job: JobRow, work: Callable[[Session, JobRow], T]) -> T:
        """Do work on the row of a job, locked until the transaction ends."""

        def locked(session: Session) -> T:
            return work(session, session.get_one(JobRow, job.id, with_for_update=True))

        return self._database.retry_transaction(locked, self._workflows.stopping)
