"""`BatchStore`: the rows of batches, their answers, and every change of their status."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from sqlalchemy import delete, insert, select, update

from service.errors import InvalidRequest
from service.jobs.batches.lines import WINDOW_SECONDS, LineAnswer, LineError, Outcome
from service.jobs.database import Database
from service.jobs.file_store import FileStore
from service.jobs.rows import check_unfinished, file_row, index, new_id, owned
from service.jobs.schemas import BatchRequest
from service.jobs.tables import ENDED, AnswerRow, BatchRow
from service.jobs.webhooks import Webhooks
from service.jobs.workflows import Workflows

LOST_SECONDS = 10  # after which a batch without a workflow gets one
PAGE = 500  # answers that are read in one transaction


class OutputFile(NamedTuple):
    """The output or error file of a batch, before it has a row."""

    id: str
    lines: int
    bytes: int


class BatchStore:
    """The batches of all owners; each owner sees only its own. Every method blocks: call them off the event loop."""

    def __init__(
        self, database: Database, files: FileStore, workflows: Workflows, webhooks: Webhooks, unfinished_per_owner: int
    ) -> None:
        self._database = database
        self._files = files
        self._workflows = workflows
        self._webhooks = webhooks
        self._unfinished_per_owner = unfinished_per_owner

    # Requests of clients

    def create(self, body: BatchRequest, owner: str, base: str, now: int) -> BatchRow:
        """Add a batch and start its workflow. Links to its images begin with `base`.

        Raises NotFound or InvalidRequest for its file, Overloaded if the owner has too many unfinished batches.
        """
        batch = BatchRow(
            id=new_id("batch_"),
            owner=owner,
            status="validating",
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            links=base,
            output_seconds=body.output_expires_after.seconds if body.output_expires_after else None,
            details=body.metadata,
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
        )
        with self._database.begin(owner) as session:
            file = self._files.own(session, owner, body.input_file_id, now, "input_file_id")
            if file.purpose != "batch":
                message = f"file {file.id} has purpose {file.purpose!r}; upload it with purpose 'batch'"
                raise InvalidRequest(message, "input_file_id", "invalid_file_purpose")
            check_unfinished(session, BatchRow, owner, self._unfinished_per_owner, 60, "too_many")
            session.add(batch)
        self._workflows.begin("batch", batch.id)
        return batch

    def get(self, owner: str, batch_id: str) -> BatchRow:
        """Return a batch. Raises NotFound if it does not exist or has another owner."""
        with self._database.read() as session:
            return owned(session, BatchRow, owner, batch_id)

    def index(self, owner: str, after: str | None, limit: int) -> tuple[Sequence[BatchRow], bool]:
        """Return a page of batches, newest first, and whether there are more."""
        with self._database.read() as session:
            return index(session, BatchRow, owner, after, limit)

    def cancel(self, owner: str, batch_id: str, now: int) -> BatchRow:
        """Start no further line. Raises NotFound, and InvalidRequest for a batch that has ended or is finalizing."""
        with self._database.begin() as session:
            batch = owned(session, BatchRow, owner, batch_id)
            cancellable = BatchRow.status.in_(("validating", "in_progress"))
            cancelled = update(BatchRow).where(BatchRow.id == batch.id, cancellable)
            session.execute(cancelled.values(status="cancelling", cancelling_at=now))
            session.refresh(batch)
            if batch.status not in ("cancelling", "cancelled"):
                raise InvalidRequest(f"the batch is {batch.status}; it cannot be cancelled", code="batch_not_running")
        return batch

    # Steps of the workflow

    def begin_lost(self, now: int) -> None:
        """Start the workflows of unfinished batches that have none.

        Their server died before it could start them, or the backup of the workflows is older than that of the batches.
        """
        with self._database.read() as session:
            lost = select(BatchRow.id).where(BatchRow.status.not_in(ENDED))
            ids = list(session.scalars(lost.where(BatchRow.created_at < now - LOST_SECONDS)))
        for batch_id in ids:
            self._workflows.begin("batch", batch_id)

    def read(self, batch_id: str) -> BatchRow:
        """Return a batch of any owner."""
        with self._database.read() as session:
            return session.get_one(BatchRow, batch_id)

    def start(self, batch_id: str, total: int, model: str | None) -> None:
        """Record a valid input file: its number of lines, and their model if it is the same for all."""
        with self._database.begin() as session:
            row = session.get_one(BatchRow, batch_id, with_for_update=True)
            row.total, row.model = total, model
            if row.status == "validating":
                row.status, row.in_progress_at = "in_progress", int(time.time())

    def answered(self, batch_id: str) -> set[int]:
        """Return the numbers of the lines that have an answer."""
        with self._database.read() as session:
            return set(session.scalars(select(AnswerRow.number).where(AnswerRow.batch_id == batch_id)))

    def answers(self, batch_id: str) -> Iterator[AnswerRow]:
        """Yield all answers by line number, read in pages."""
        last = 0
        while True:
            rows = select(AnswerRow).where(AnswerRow.batch_id == batch_id, AnswerRow.number > last)
            with self._database.read() as session:
                found = session.scalars(rows.order_by(AnswerRow.number).limit(PAGE)).all()
            if not found:
                return
            yield from found
            last = found[-1].number

    def record(self, batch_id: str, answers: Sequence[LineAnswer]) -> Outcome | None:
        """Add answers and count them. Returns why no further line should start, or None if lines should go on."""
        with self._database.begin() as session:
            batch = session.get_one(BatchRow, batch_id, with_for_update=True)
            if batch.status in ENDED:
                return "answered"  # by another server, which considered this one dead
            numbers = [answer.number for answer in answers]
            known = select(AnswerRow.number).where(AnswerRow.batch_id == batch_id, AnswerRow.number.in_(numbers))
            before = set(session.scalars(known)) if numbers else set()
            new = [answer for answer in answers if answer.number not in before]
            if new:
                rows = [{"batch_id": batch_id, "number": a.number, "failed": a.failed, "answer": a.text} for a in new]
                session.execute(insert(AnswerRow), rows)
            batch.completed += sum(not answer.failed for answer in new)
            batch.failed += sum(answer.failed for answer in new)
            batch.input_tokens += sum(answer.input_tokens for answer in new)
            batch.output_tokens += sum(answer.output_tokens for answer in new)
            if batch.status == "cancelling":
                return "cancelled"
            if batch.completed + batch.failed == batch.total:
                return "answered"
            return "expired" if time.time() >= batch.expires_at else None

    def write_files(self, lines: Iterable[tuple[str, bool]]) -> list[OutputFile]:
        """Write each line to the error file if its flag says so, else to the output file.

        The ids are new in each call, so that no call overwrites a file that clients can see.
        """
        ids, counts = (new_id("file-"), new_id("file-")), [0, 0]
        with self._files.writing(ids[0]) as output, self._files.writing(ids[1]) as errors:
            for text, is_error in lines:
                (errors if is_error else output).write(text.encode() + b"\n")
                counts[is_error] += 1
        return [
            OutputFile(each, count, self._files.path(each).stat().st_size)
            for each, count in zip(ids, counts, strict=True)
        ]

    def finalize(self, batch_id: str, outcome: Outcome) -> Outcome:
        """End the time in which a batch can be cancelled. Returns the outcome, which a cancellation changes."""
        with self._database.begin() as session:
            batch = session.get_one(BatchRow, batch_id, with_for_update=True)
            if batch.status == "cancelling":
                return "cancelled"
            if batch.status == "in_progress":
                batch.status = "finalizing"
                batch.finalizing_at = int(time.time())
        return outcome

    def end(
        self, batch_id: str, status: str, line_errors: Sequence[LineError], output: OutputFile, errors: OutputFile
    ) -> bool:
        """Add the files of a batch, its last status and its webhook; False if another server has ended it.

        A file without lines gets no row.
        """
        now = int(time.time())
        with self._database.begin() as session:
            batch = session.get_one(BatchRow, batch_id, with_for_update=True)
            if batch.status in ENDED:
                return False
            for file, name in ((output, "output"), (errors, "error")):
                if file.lines:
                    filename, lifetime = f"{batch_id}_{name}.jsonl", batch.output_seconds
                    session.add(file_row(file.id, batch.owner, "batch_output", filename, file.bytes, now, lifetime))
            batch.output_file_id = output.id if output.lines else None
            batch.error_file_id = errors.id if errors.lines else None
            batch.failed = errors.lines  # includes the lines that never started
            batch.errors = [vars(error) for error in line_errors] or None
            session.execute(delete(AnswerRow).where(AnswerRow.batch_id == batch_id))
            batch.status = status
            setattr(batch, f"{status}_at", now)
            self._webhooks.announce(session, batch.owner, f"batch.{status}", batch_id, now)
        return True
