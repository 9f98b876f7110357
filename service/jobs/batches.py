"""Bulk batches: thousands of image requests from a file, answered in files, each line exactly once.

A batch is one durable workflow of three steps: check the input file, answer its lines, write the output files. The
answer to a line is a row whose key is the line, kept in the transaction that counts it; so whatever is killed, and
however often the step begins again, a line is answered once. An image may be made twice, in the moment of a kill, but
then it is the same one: a line without a seed gets one from its batch and number.
"""

import asyncio
import concurrent.futures
import hashlib
import logging
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from service.errors import (
    GenerationFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServiceError,
    TimedOut,
    Unavailable,
    quoted,
    to_openai,
)
from service.images.generation import Images, make, respond
from service.jobs.files import new_id, page
from service.jobs.jobs import Jobs
from service.jobs.lines import (
    WINDOW_SECONDS,
    Answer,
    Complaint,
    Outcome,
    Request,
    id_of,
    numbered,
    parse,
    unanswered,
)
from service.jobs.schemas import BatchRequest
from service.jobs.tables import ENDED, AnswerRow, BatchRow, FileRow
from service.state import State

log = logging.getLogger(__name__)

MAX_LINES = 50_000
MAX_ERRORS = 100  # of a file that is refused
SIDE_BY_SIDE = 4  # batches that one server works on at a time
KEEP_SECONDS = 0.5  # between two looks at the database; so long an answer may be in memory alone
ATTEMPTS = 3  # at a line that the model, or the server itself, fails on
LOST_SECONDS = 10  # after which a batch without a workflow gets one; its server died between the two
PAGE = 500  # answers in memory while the files are written


class InputGone(Exception):
    """The input file is no longer there."""


class Batches:
    """The batches of all owners; nobody is told of another's. Every method blocks: call them off the event loop."""

    def __init__(self, service: State, jobs: Jobs, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the one that the engine runs on. To be made before the jobs start."""
        self._service = service
        self._settings = service.settings
        self._database = jobs.database
        self._files = jobs.files
        self._workflows = jobs.workflows
        self._webhooks = jobs.webhooks
        self._loop = loop
        jobs.workflows.define("batch", self._work, SIDE_BY_SIDE)
        jobs.periodic_tasks.append(self._begin_lost)

    # What requests ask for

    def create(self, body: BatchRequest, owner: str, base: str, now: int) -> BatchRow:
        """Take a batch in. Raises NotFound or InvalidRequest for its file, Overloaded when there are too many."""
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
            limit = self._settings.unfinished_batches_per_key
            unfinished = select(func.count()).where(BatchRow.owner == owner, BatchRow.status.not_in(ENDED))
            if (session.scalar(unfinished) or 0) >= limit:
                raise Overloaded(f"{limit} of your batches are unfinished; wait for one or cancel it", 60, "too_many")
            session.add(batch)
        self._workflows.begin("batch", batch.id)
        return batch

    def get(self, owner: str, batch_id: str) -> BatchRow:
        """A batch. Raises NotFound for one that is not there, or is another's."""
        with self._database.read() as session:
            return self._own(session, owner, batch_id)

    def index(self, owner: str, after: str | None, limit: int) -> tuple[Sequence[BatchRow], bool]:
        """Batches, the newest first, and whether there are more."""
        with self._database.read() as session:
            start = None if after is None else self._own(session, owner, after, "after")
            rows = page(select(BatchRow).where(BatchRow.owner == owner), BatchRow, start, "desc", limit)
            found = session.scalars(rows).all()
        return found[:limit], len(found) > limit

    def cancel(self, owner: str, batch_id: str, now: int) -> BatchRow:
        """Begin no further line. Raises NotFound, and InvalidRequest for a batch that has ended or is about to."""
        with self._database.begin() as session:
            batch = self._own(session, owner, batch_id)
            stopped = update(BatchRow).where(
                BatchRow.id == batch.id, BatchRow.status.in_(("validating", "in_progress"))
            )
            session.execute(stopped.values(status="cancelling", cancelling_at=now))
            session.refresh(batch)
            if batch.status not in ("cancelling", "cancelled"):
                raise InvalidRequest(f"the batch is {batch.status}; it cannot be cancelled", code="batch_not_running")
        return batch

    def _own(self, session: Session, owner: str, batch_id: str, param: str | None = None) -> BatchRow:
        batch = session.get(BatchRow, batch_id) if batch_id.isascii() and batch_id.isprintable() else None
        if batch is None or batch.owner != owner:
            raise NotFound(
                f"there is no batch {quoted(batch_id)}; GET /v1/batches lists yours", param, "batch_not_found"
            )
        return batch

    def _begin_lost(self, now: int) -> None:
        """A chore: a batch that has no workflow gets one; its server died before it could, or its backup is older."""
        with self._database.read() as session:
            lost = select(BatchRow.id).where(BatchRow.status.not_in(ENDED))
            ids = list(session.scalars(lost.where(BatchRow.created_at < now - LOST_SECONDS)))
        for batch_id in ids:
            self._workflows.begin("batch", batch_id)

    # The workflow and its steps

    def _work(self, batch_id: str) -> None:
        step = self._workflows.retrying_step
        try:
            if step("check", lambda: self._check(batch_id)):
                outcome = step("answer", lambda: self._answer(batch_id))
                step("write", lambda: self._write(batch_id, outcome))
        except InputGone:
            complaint = Complaint("input_file_gone", "the input file is no longer there", None, "input_file_id")
            step("fail", lambda: self._fail(batch_id, [complaint]))
        except Exception:
            log.exception("%s failed", batch_id)
            complaint = Complaint("server_error", f"the server failed; its log has it under {batch_id}", None, None)
            step("fail", lambda: self._fail(batch_id, [complaint]))

    def _check(self, batch_id: str) -> bool:
        """Read the whole file once; returns whether its lines can be made, and fails the batch if not."""
        batch = self._read(batch_id)
        if batch.status not in ("validating", "cancelling"):
            return batch.status not in ENDED  # this step's end was not recorded
        complaints, total, models = self._review(batch)
        if complaints:
            self._fail(batch_id, complaints)
            return False
        with self._database.begin() as session:
            row = session.get_one(BatchRow, batch_id, with_for_update=True)
            row.total, row.model = total, models.pop() if len(models) == 1 else None
            if row.status == "validating":
                row.status, row.in_progress_at = "in_progress", int(time.time())
        return True

    def _review(self, batch: BatchRow) -> tuple[list[Complaint], int, set[str]]:
        """What is wrong with a file, the first of it; how many lines it has, and the models that they ask for."""
        complaints: list[Complaint] = []
        models: set[str] = set()
        seen: set[bytes] = set()  # digests, for a custom_id may be long
        total = 0
        for number, line in self._lines(batch):
            if len(complaints) == MAX_ERRORS:
                break
            total += 1
            if total > MAX_LINES:
                complaints.append(Complaint("too_many_lines", f"a batch has {MAX_LINES} lines at most", number, None))
                break
            found = parse(self._service, batch.id, number, line)
            if isinstance(found, Complaint):
                complaints.append(found)
                continue
            digest = hashlib.blake2b(found.custom_id.encode(), digest_size=16).digest()
            if digest in seen:
                message = f"custom_id {quoted(found.custom_id)} is there twice; answers are told apart by it"
                complaints.append(Complaint("duplicate_custom_id", message, number, "custom_id"))
            seen.add(digest)
            models.add(found.order.model)
        if not total:
            complaints.append(Complaint("empty_file", "the file has no lines", None, "input_file_id"))
        return complaints, total, models

    def _answer(self, batch_id: str) -> Outcome:
        """Have every line made that has no answer yet; returns why it ended."""
        batch = self._read(batch_id)
        if batch.status in ENDED:
            return "answered"
        with self._database.read() as session:
            answered = set(session.scalars(select(AnswerRow.number).where(AnswerRow.batch_id == batch_id)))
        lines = self._requests(batch, answered)
        making: set[concurrent.futures.Future[Answer]] = set()
        made: list[Answer] = []
        looked = -KEEP_SECONDS
        outcome: Outcome | None = None
        try:
            while True:
                if time.monotonic() - looked >= KEEP_SECONDS or len(made) >= self._settings.batch_lines_at_once:
                    outcome = self._keep(batch_id, made)
                    made = []
                    looked = time.monotonic()
                if outcome is not None:
                    return self._finalize(batch_id, outcome)
                while len(making) + len(made) < self._settings.batch_lines_at_once:
                    request = next(lines, None)
                    if request is None:
                        break
                    if isinstance(request, Answer):
                        made.append(request)
                    else:
                        making.add(asyncio.run_coroutine_threadsafe(self._make(batch, request), self._loop))
                if not making and len(made) < self._settings.batch_lines_at_once:
                    return self._finalize(batch_id, self._keep(batch_id, made) or "answered")
                done, making = concurrent.futures.wait(making, KEEP_SECONDS, concurrent.futures.FIRST_COMPLETED)
                self._workflows.wait(0)
                made += [future.result() for future in done]
        finally:
            for future in making:
                future.cancel()

    async def _make(self, batch: BatchRow, request: Request) -> Answer:
        """One line's answer, however long its turn takes; errors are answers too."""
        attempts = 0
        images: Images | None = None  # made, but not stored yet
        while True:
            try:
                images = images or await make(
                    self._service, self._service.engine, request.order, batch.owner, patient=True
                )
                answer = await respond(self._service, images, batch.links, self._settings.batch_link_seconds)
            except (TimedOut, Unavailable):
                # Others came first, the server is draining, or the store of images is away.
                await asyncio.sleep(random.uniform(0.5, 1.5))
            except ServiceError as error:
                attempts += 1
                if not isinstance(error, GenerationFailed) or attempts == ATTEMPTS:
                    return _refusal(batch, request, error)
            except Exception:  # of a safety check or a signature, say; the other lines go on
                log.exception("line %d of %s failed", request.number, batch.id)
                attempts += 1
                if attempts == ATTEMPTS:
                    message = f"the server failed on this request; its log has it under {batch.id}"
                    return _refusal(batch, request, ServiceError(message))
                await asyncio.sleep(random.uniform(0.5, 1.5))
            else:
                body = answer.model_dump(mode="json", exclude_none=True)
                return Answer.of(batch.id, request.number, request.custom_id, 200, body, images.usage)

    def _keep(self, batch_id: str, answers: Sequence[Answer]) -> Outcome | None:
        """Keep answers; returns why no further line should begin, if so."""
        with self._database.begin() as session:
            batch = session.get_one(BatchRow, batch_id, with_for_update=True)
            if batch.status in ENDED:
                return "answered"  # by another server, which took this one for dead
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

    def _finalize(self, batch_id: str, outcome: Outcome) -> Outcome:
        """Nothing can be cancelled any more; what was is told apart here."""
        with self._database.begin() as session:
            batch = session.get_one(BatchRow, batch_id, with_for_update=True)
            if batch.status == "cancelling":
                return "cancelled"
            if batch.status == "in_progress":
                batch.status = "finalizing"
                batch.finalizing_at = int(time.time())
        return outcome

    def _write(self, batch_id: str, outcome: Outcome) -> None:
        """End a batch with files in the order of the input."""
        batch = self._read(batch_id)
        if batch.status not in ENDED:
            self._end(batch, self._told(batch, outcome), "completed" if outcome == "answered" else outcome)

    def _fail(self, batch_id: str, complaints: Sequence[Complaint]) -> None:
        """End a batch that cannot be made, or made to its end, with files of what was answered."""
        batch = self._read(batch_id)
        if batch.status not in ENDED:
            answers = ((line.answer, line.failed) for line in self._answers(batch_id))
            self._end(batch, answers, "failed", complaints)

    def _end(
        self, batch: BatchRow, lines: Iterable[tuple[str, bool]], status: str, complaints: Sequence[Complaint] = ()
    ) -> None:
        """Write lines, each told whether it is an error, and end a batch in the transaction that makes them known."""
        written, failed = new_id("file-"), new_id("file-")  # new ones each time: nobody overwrites what is known
        counts = {written: 0, failed: 0}
        with self._files.writing(written) as output, self._files.writing(failed) as errors:
            for text, is_error in lines:
                (errors if is_error else output).write(text.encode() + b"\n")
                counts[failed if is_error else written] += 1
        if self._finish(batch.id, status, complaints, written, failed, counts):
            counts = {file_id: 0 for file_id, count in counts.items() if not count}
        for file_id in counts:
            self._files.path(file_id).unlink(missing_ok=True)

    def _finish(
        self,
        batch_id: str,
        status: str,
        complaints: Sequence[Complaint],
        written: str,
        failed: str,
        counts: Mapping[str, int],
    ) -> bool:
        """Give a batch its files, its last status and the event that tells of it; False when another server has."""
        now = int(time.time())
        with self._database.begin() as session:
            batch = session.get_one(BatchRow, batch_id, with_for_update=True)
            if batch.status in ENDED:
                return False
            for file_id, name in ((written, "output"), (failed, "error")):
                if counts[file_id]:
                    session.add(
                        FileRow(
                            id=file_id,
                            owner=batch.owner,
                            purpose="batch_output",
                            filename=f"{batch_id}_{name}.jsonl",
                            bytes=self._files.path(file_id).stat().st_size,
                            created_at=now,
                            expires_at=None if batch.output_seconds is None else now + batch.output_seconds,
                        )
                    )
            batch.output_file_id = written if counts[written] else None
            batch.error_file_id = failed if counts[failed] else None
            batch.failed = counts[failed]  # with the lines that nobody began
            batch.errors = [vars(complaint) for complaint in complaints] or None
            session.execute(delete(AnswerRow).where(AnswerRow.batch_id == batch_id))
            batch.status = status
            setattr(batch, f"{status}_at", now)
            self._webhooks.announce(session, batch.owner, f"batch.{status}", batch_id, now)
        return True

    # Lines

    def _read(self, batch_id: str) -> BatchRow:
        with self._database.read() as session:
            return session.get_one(BatchRow, batch_id)

    def _requests(self, batch: BatchRow, answered: set[int]) -> Iterator[Request | Answer]:
        """The lines without an answer, in order. One that can no longer be made is answered by that."""
        for number, line in self._lines(batch):
            if number in answered:
                continue
            found = parse(self._service, batch.id, number, line)
            if isinstance(found, Complaint):
                kind = "invalid_request_error"
                error = {"message": found.message, "type": kind, "param": found.param, "code": found.code}
                status = 404 if found.code == "model_not_found" else 400
                yield Answer.of(batch.id, number, id_of(line), status, {"error": error})
            else:
                yield found

    def _lines(self, batch: BatchRow) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank, and their numbers. Raises InputGone, or Stopping when the server shuts down."""
        try:
            for number, line in numbered(self._files.path(batch.input_file_id), self._settings.max_body_bytes):
                self._workflows.wait(0)
                if line.strip():
                    yield number, line
        except FileNotFoundError:
            raise InputGone from None

    def _told(self, batch: BatchRow, outcome: Outcome) -> Iterator[tuple[str, bool]]:
        """What is said of each line of the input, and whether it is an error."""
        answers = self._answers(batch.id)
        upcoming = next(answers, None)
        for number, line in self._lines(batch):
            if upcoming is not None and upcoming.number == number:
                yield upcoming.answer, upcoming.failed
                upcoming = next(answers, None)
            else:
                yield unanswered(batch.id, number, line, outcome), True

    def _answers(self, batch_id: str) -> Iterator[AnswerRow]:
        """All answers by number, some at a time."""
        last = 0
        while True:
            rows = (
                select(AnswerRow)
                .where(AnswerRow.batch_id == batch_id, AnswerRow.number > last)
                .order_by(AnswerRow.number)
                .limit(PAGE)
            )
            with self._database.read() as session:
                found = session.scalars(rows).all()
            if not found:
                return
            yield from found
            last = found[-1].number


def _refusal(batch: BatchRow, request: Request, error: ServiceError) -> Answer:
    """The answer to a line that came to an error."""
    status, body, _ = to_openai(error)
    return Answer.of(batch.id, request.number, request.custom_id, status, body)
