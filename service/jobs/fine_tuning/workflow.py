"""The workflows of a distillation job: its prompts are read, then a `distill run` in a process of its own goes on
until it has ended.

The row in `jobs` is the only state, and its `requested_action` says whether to pause or cancel. The same command
resumes a run, whatever stopped it. So a workflow that starts again, on this server or another, only reads the row and
runs the same command.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.errors import NotFound, shortened
from service.files import DISK_FULL
from service.jobs.database import Database
from service.jobs.file_store import FileStore
from service.jobs.fine_tuning.events import EtaEstimator, Level, record_checkpoint, record_event, record_log_lines
from service.jobs.fine_tuning.options import DistillationOptions, find_teacher, prompts_command, run_command
from service.jobs.fine_tuning.run_folder import JobFolder, environment
from service.jobs.fine_tuning.students import Students, run_folder
from service.jobs.tables import ENDED, FileRow, JobRow
from service.jobs.webhooks import Webhooks
from service.jobs.workflows import Workflows
from service.settings import Settings

T = TypeVar("T")

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
SIDE_BY_SIDE = 2  # files of prompts that one server reads at a time
DELETED_SECONDS = 60  # that the files of a deleted student stay: every server has let go of it by then
REFUSED, CLAIMED = 2, 75  # how `distill run` ends: for a reason that it names; because another process has the folder
LINES = 100  # of a run's logs that are told in one transaction
CRASHES = 3  # in a row, without an image more, that end a job


class JobFailed(Exception):
    """Why a job cannot go on, as its client is told."""

    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        message = shortened(message)  # a run's error may repeat text of the training file
        super().__init__(message)
        self.error = {"code": code, "message": message, "param": param}


class FineTuningWorkflow:
    """Carries jobs out, one at a time in this process. Every method blocks: call them off the event loop."""

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
        """Defines its workflows, so before they start. Runs are in the folder `data`."""
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
        """Read the prompts of a new job; carry out one that is queued, when its turn comes. Harmless to repeat."""
        if job.status == "validating_files":
            self._workflows.begin("validation", f"{job.id}.files")
        else:
            self._workflows.begin("distillation", f"{job.id}.{job.starts}")

    def end(self, session: Session, job: JobRow, status: str, message: str, level: Level = "info") -> None:
        """End a job for good, in the caller's transaction. One that has ended already stays as it is.

        A student that was made before the job was cancelled or failed is served no more.
        """
        if job.status in ENDED:
            return
        now = int(time.time())
        if status != "succeeded":
            job.fine_tuned_model = None
        job.status, job.requested_action, job.finished_at, job.estimated_finish = status, None, now, None
        record_event(session, job, message, level)
        self._webhooks.announce(session, job.owner, f"fine_tuning.job.{status}", job.id, now)

    def folder(self, job: JobRow) -> JobFolder:
        """Where a job runs."""
        return JobFolder(run_folder(self._data, job.id))

    def begin_waiting(self, now: int) -> None:
        """Begin what has no workflow: its server died before it could, or its backup is older than the job's."""
        unfinished = select(JobRow).where(JobRow.status.in_(("validating_files", "queued", "running")))
        with self._database.read() as session:
            jobs = list(session.scalars(unfinished))
        for job in jobs:
            self.begin(job)

    def remove_deleted(self, now: int) -> None:
        """Remove the files of students that were deleted a while ago."""
        with self._database.read() as session:
            gone = select(JobRow).where(
                JobRow.fine_tuned_model.is_not(None), JobRow.deleted_at <= now - DELETED_SECONDS
            )
            jobs = list(session.scalars(gone))
        for job in jobs:
            shutil.rmtree(self.folder(job).student, ignore_errors=True)
            with self._database.begin() as session:
                _row(session, job).fine_tuned_model = None

    def _validate(self, key: str) -> None:
        """The workflow of a new job: its prompts are kept and read once, before the job waits for its turn."""
        name = key.partition(".")[0]
        job = self._find(JobRow, name)
        if job is not None and job.status == "validating_files":
            with self._failing(job):
                self._read_prompts(job, self.folder(job))
            now = self._transact(lambda session: _validated(session, job))
            if now.status == "queued":
                self.begin(now)
            self._webhooks.begin_due(int(time.time()))
        self._let_go(name)

    def _read_prompts(self, job: JobRow, folder: JobFolder) -> None:
        """Raises JobFailed where `distill run` would find the prompts at fault."""
        words = prompts_command(DistillationOptions.model_validate(job.distillation), self._prompts(job, folder))
        with folder.process(words, environment(["cpu"]), self._settings.jobs.nice) as child:
            while child.status() is None:
                self._workflows.wait(POLL_SECONDS)
            if child.status() == REFUSED:
                raise _refusal(folder.reason())

    def _run(self, key: str) -> None:
        """The workflow: one start of one job, to its end or to the next pause."""
        name, _, start = key.partition(".")
        job = self._transact(lambda session: _enter(session, name, int(start)))
        if job is not None:
            with self._failing(job):
                self._distill(job, self.folder(job))
            self._webhooks.begin_due(int(time.time()))
        self._let_go(name)

    @contextmanager
    def _failing(self, job: JobRow) -> Iterator[None]:
        """What goes wrong inside ends the job as failed."""
        try:
            yield
        except JobFailed as failed:
            self._fail(job, failed)
        except OSError as error:
            self._fail(job, _storage(error))
        except Exception:
            log.exception("%s failed", job.id)
            message = f"something went wrong here; the server's log has it under {job.id}"
            self._fail(job, JobFailed(message, "server_error"))

    def _let_go(self, name: str) -> None:
        """Remove what a job that has ended needs no more, also where a server died before it had."""
        job = self._find(JobRow, name)
        if job is not None and job.status == "succeeded":
            self.folder(job).tidy()
        elif job is not None and job.status == "cancelled":
            self.folder(job).remove()

    def _distill(self, job: JobRow, folder: JobFolder) -> None:
        """Run the command until the job has ended or is paused. Raises JobFailed."""
        words = self._prepare(job, folder)
        crashes, furthest = 0, -1
        while True:
            status, asked = self._attempt(job, folder, words)
            requested_action = self._transact(lambda session: _row(session, job).requested_action)
            if requested_action == "cancel":
                self._transact(
                    lambda session: self.end(session, _row(session, job), "cancelled", "The job is cancelled.")
                )
                return
            if status == 0 and folder.finished():
                self._succeed(job, folder)
                return
            if requested_action == "pause" and self._transact(lambda session: _pause(session, _row(session, job))):
                return
            if status == REFUSED:
                raise _refusal(folder.reason())
            if status != CLAIMED and not asked:
                seen = max([0, *folder.checkpoints()])
                crashes = 1 if seen > furthest else crashes + 1
                furthest = seen
                if crashes == CRASHES:
                    last = f"the run broke off {crashes} times after {seen} images"
                    raise JobFailed(f"{last}: {folder.log_tail()}", "run_broke_off")
                self._warn(job, f"The run broke off with status {status}; it goes on from {seen} images.")
            # A folder that is claimed is let go when the process of a dead server has written its checkpoint.
            self._workflows.wait(POLL_SECONDS)

    def _prepare(self, job: JobRow, folder: JobFolder) -> list[str]:
        """The command. Raises JobFailed."""
        prompts = self._prompts(job, folder)
        try:
            teacher = find_teacher(self._settings.jobs.teachers, job.model)
        except NotFound as error:
            raise JobFailed(error.message, error.code or "model_not_found", error.param) from None
        asked = DistillationOptions.model_validate(job.distillation)
        return run_command(asked, teacher, prompts, job.seed, folder.path)

    def _prompts(self, job: JobRow, folder: JobFolder) -> Path:
        """The prompts in the job's folder, where nobody deletes them. Raises JobFailed."""
        kept = folder.prompts()
        if kept is not None:
            return kept
        file = self._find(FileRow, job.training_file)
        try:
            if file is None:
                raise FileNotFoundError
            return folder.keep_prompts(self._files.path(file.id), Path(file.filename).suffix)
        except FileNotFoundError:
            message = f"the file {job.training_file} was deleted before the job began"
            raise JobFailed(message, "file_not_found", "training_file") from None

    def _attempt(self, job: JobRow, folder: JobFolder, words: Sequence[str]) -> tuple[int, bool]:
        """Run the command to its end, or until the job is to stop: its status, and whether it was asked to stop."""
        pace, asked = EtaEstimator(), False
        devices = self._devices
        with folder.process(words, environment(devices), self._settings.jobs.nice, len(devices)) as child:
            while child.status() is None and not (asked := self._relay(job, folder, pace)):
                self._workflows.wait(POLL_SECONDS)
            status = child.stop()
        self._relay(job, folder, pace)
        return status, asked

    def _relay(self, job: JobRow, folder: JobFolder, pace: EtaEstimator) -> bool:
        """Write down what the run has told since; whether the job is to stop.

        A server that takes over reads the logs from their beginning, so lines are written some at a time: meanwhile
        the row is locked, and with SQLite the database.
        """
        budget, checkpoints, lines = folder.budget(), folder.new_checkpoints(), folder.new_lines()

        def tell_lines(session: Session) -> None:
            row = _row(session, job)
            row.images_total = budget or row.images_total
            record_log_lines(session, row, piece)

        while piece := list(islice(lines, LINES)):
            self._transact(tell_lines)
        # After the lines: an evaluation that comes now joins its checkpoint when its own line is told.
        metrics = {images: folder.metrics(images) for images in checkpoints}

        def tell_checkpoints(session: Session) -> bool:
            row = _row(session, job)
            row.images_total = budget or row.images_total
            for images in checkpoints:
                record_checkpoint(session, row, images, metrics[images])
            row.estimated_finish = pace.finish(row.images_seen, row.images_total)
            return row.requested_action is not None

        return self._transact(tell_checkpoints)

    def _succeed(self, job: JobRow, folder: JobFolder) -> None:
        """Serve the student and write the results, then say so."""
        results = f"file-{job.stem}"

        def made(session: Session) -> None:
            _row(session, job).fine_tuned_model = job.student

        def write() -> int:
            with self._files.writing(results) as file:
                return file.write(folder.results().encode())

        def ended(session: Session) -> None:
            row = _row(session, job)
            if row.status not in ENDED:
                row.result_files = [results]
                session.add(
                    FileRow(
                        id=results,
                        owner=row.owner,
                        purpose="fine-tune-results",
                        filename=f"{job.id}_results.csv",
                        bytes=size,
                        created_at=int(time.time()),
                    )
                )
            self.end(session, row, "succeeded", f"The student is {job.student}.")

        self._transact(made)
        self._students.serve()
        size = self._workflows.retrying_step("results", write)
        self._transact(ended)

    def _warn(self, job: JobRow, message: str) -> None:
        self._transact(lambda session: record_event(session, _row(session, job), message, "warn"))

    def _fail(self, job: JobRow, failed: JobFailed) -> None:
        def ended(session: Session) -> None:
            row = _row(session, job)
            if row.status in ENDED:
                return
            row.error = failed.error
            self.end(session, row, "failed", f"The job failed: {failed}", "error")

        self._transact(ended)

    def _find(self, kind: type[T], key: str) -> T | None:
        return self._database.retry_transaction(
            lambda session: session.get(kind, key), self._workflows.stopping, read=True
        )

    def _transact(self, work: Callable[[Session], T]) -> T:
        return self._database.retry_transaction(work, self._workflows.stopping)


def _enter(session: Session, name: str, start: int) -> JobRow | None:
    """The job as it is to be carried out now; None when it is not, or not by this start."""
    job = session.get(JobRow, name, with_for_update=True)
    if job is None or job.starts != start or job.status not in ("queued", "running"):
        return None
    if job.status == "queued":
        job.status = "running"
        record_event(session, job, "The job runs." if start == 0 else "The job goes on.")
    return job


def _validated(session: Session, job: JobRow) -> JobRow:
    """The job, in the queue unless it has ended or was paused meanwhile."""
    row = _row(session, job)
    if row.status == "validating_files":
        row.status = "queued"
        record_event(session, row, "The job waits for its turn.")
    return row


def _row(session: Session, job: JobRow) -> JobRow:
    """A job's row, locked until the transaction ends."""
    return session.get_one(JobRow, job.id, with_for_update=True)


def _pause(session: Session, job: JobRow) -> bool:
    """Whether the job is still to be paused, and is."""
    if job.requested_action != "pause":
        return False
    job.status, job.requested_action, job.estimated_finish = "paused", None, None
    record_event(session, job, f"The job is paused after {job.images_seen} images.")
    return True


def _storage(error: OSError) -> JobFailed:
    """What the job's folder could not take."""
    code = "disk_full" if error.errno in DISK_FULL else "storage_error"
    return JobFailed(f"the server cannot write the job's files: {error.strerror}", code)


def _refusal(words: str) -> JobFailed:
    """What a run that ended for a reason said of it."""
    if "No space left" in words:
        return JobFailed(words, "disk_full")
    if words.startswith("prompts."):
        return JobFailed(words, "invalid_training_file", "training_file")
    return JobFailed(words, "distillation_failed", "distillation")
