"""Bulk batches: thousands of image requests from a file, answered in files, each line exactly once.

A batch is one durable workflow of three steps: check the input file, answer its lines, write the output files. The
answer to a line is a row whose key is the line, kept in the transaction that counts it; so whatever is killed, and
however often the step begins again, a line is answered once. An image may be made twice, in the moment of a kill, but
then it is the same one: a line without a seed gets one from its batch and number.
"""

import asyncio
import concurrent.futures
import hashlib
import itertools
import json
import logging
import random
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from service.engine.batcher import Priority
from service.errors import (
    GenerationFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServiceError,
    TimedOut,
    Unavailable,
    to_openai,
)
from service.generation import MAX_SEED, Images, Order, make, respond
from service.jobs.files import new_id, page
from service.jobs.jobs import Jobs
from service.jobs.schemas import BatchLine, BatchRequest
from service.jobs.tables import ENDED, Batch, File, Line
from service.state import State

log = logging.getLogger(__name__)

Outcome = Literal["answered", "expired", "cancelled"]

MAX_LINES = 50_000
MAX_ERRORS = 100  # of a file that is refused
WINDOW_SECONDS = 86_400
SIDE_BY_SIDE = 4  # batches that one server works on at a time
KEEP_SECONDS = 0.5  # between two looks at the database; so long an answer may be in memory alone
ATTEMPTS = 3  # at a line that the model fails on
LOST_SECONDS = 10  # after which a batch without a workflow gets one; its server died between the two
PAGE = 500  # answers in memory while the files are written


class InputGone(Exception):
    """The input file is no longer there."""


@dataclass(frozen=True)
class Request:
    """A line that can be made."""

    number: int  # from 1, as editors count
    custom_id: str
    order: Order


@dataclass(frozen=True)
class Answer:
    """What came of a line."""

    number: int
    failed: bool
    text: str  # JSON, without a line's end
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Complaint:
    """Why a line cannot be made."""

    code: str
    message: str
    line: int | None
    param: str | None


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
        jobs.chores.append(self._begin_lost)

    # What requests ask for

    def create(self, body: BatchRequest, owner: str, base: str, now: int) -> Batch:
        """Take a batch in. Raises NotFound or InvalidRequest for its file, Overloaded when there are too many."""
        batch = Batch(
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
        with self._database.begin() as session:
            file = self._files.own(session, owner, body.input_file_id, now, "input_file_id")
            if file.purpose != "batch":
                message = f"file {file.id} has purpose {file.purpose!r}; upload it with purpose 'batch'"
                raise InvalidRequest(message, "input_file_id", "invalid_file_purpose")
            limit = self._settings.unfinished_batches_per_key
            unfinished = select(func.count()).where(Batch.owner == owner, Batch.status.not_in(ENDED))
            if (session.scalar(unfinished) or 0) >= limit:
                raise Overloaded(f"{limit} of your batches are unfinished; wait for one or cancel it", 60, "too_many")
            session.add(batch)
        self._workflows.begin("batch", batch.id)
        return batch

    def get(self, owner: str, batch_id: str) -> Batch:
        """A batch. Raises NotFound for one that is not there, or is another's."""
        with self._database.begin() as session:
            return self._own(session, owner, batch_id)

    def index(self, owner: str, after: str | None, limit: int) -> tuple[Sequence[Batch], bool]:
        """Batches, the newest first, and whether there are more."""
        with self._database.begin() as session:
            start = None if after is None else self._own(session, owner, after, "after")
            rows = page(select(Batch).where(Batch.owner == owner), Batch, start, "desc", limit)
            found = session.scalars(rows).all()
        return found[:limit], len(found) > limit

    def cancel(self, owner: str, batch_id: str, now: int) -> Batch:
        """Begin no further line. Raises NotFound, and InvalidRequest for a batch that has ended or is about to."""
        with self._database.begin() as session:
            batch = self._own(session, owner, batch_id)
            stopped = update(Batch).where(Batch.id == batch.id, Batch.status.in_(("validating", "in_progress")))
            session.execute(stopped.values(status="cancelling", cancelling_at=now))
            session.refresh(batch)
            if batch.status not in ("cancelling", "cancelled"):
                raise InvalidRequest(f"the batch is {batch.status}; it cannot be cancelled", code="batch_not_running")
        return batch

    def _own(self, session: Session, owner: str, batch_id: str, param: str | None = None) -> Batch:
        batch = session.get(Batch, batch_id) if batch_id.isascii() and batch_id.isprintable() else None
        if batch is None or batch.owner != owner:
            raise NotFound(f"there is no batch {batch_id!r}; GET /v1/batches lists yours", param, "batch_not_found")
        return batch

    def _begin_lost(self, now: int) -> None:
        """A chore: a batch whose server died before it had a workflow gets one."""
        with self._database.begin() as session:
            lost = select(Batch.id).where(Batch.status.in_(("validating", "cancelling")))
            ids = list(session.scalars(lost.where(Batch.created_at < now - LOST_SECONDS)))
        for batch_id in ids:
            self._workflows.begin("batch", batch_id)

    # The workflow and its steps

    def _work(self, batch_id: str) -> None:
        step = self._workflows.patient_step
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
        complaints: list[Complaint] = []
        models: set[str] = set()
        seen: set[bytes] = set()  # digests, for a custom_id may be long
        total = 0
        for number, line in self._lines(batch):
            total += 1
            if total > MAX_LINES:
                complaints.append(Complaint("too_many_lines", f"a batch has {MAX_LINES} lines at most", number, None))
                break
            found = self._parse(batch.id, number, line)
            if isinstance(found, Complaint):
                complaints.append(found)
                if len(complaints) == MAX_ERRORS:
                    break
                continue
            digest = hashlib.blake2b(found.custom_id.encode(), digest_size=16).digest()
            if digest in seen:
                message = f"custom_id {found.custom_id!r} is there twice; answers are told apart by it"
                complaints.append(Complaint("duplicate_custom_id", message, number, "custom_id"))
            seen.add(digest)
            models.add(found.order.model)
        if not total:
            complaints.append(Complaint("empty_file", "the file has no lines", None, "input_file_id"))
        if complaints:
            self._fail(batch_id, complaints[:MAX_ERRORS])
            return False
        values: dict[str, Any] = {"total": total, "model": models.pop() if len(models) == 1 else None}
        with self._database.begin() as session:
            session.execute(update(Batch).where(Batch.id == batch_id).values(values))
            begun = update(Batch).where(Batch.id == batch_id, Batch.status == "validating")
            session.execute(begun.values(status="in_progress", in_progress_at=int(time.time())))
        return True

    def _answer(self, batch_id: str) -> Outcome:
        """Have every line made that has no answer yet; returns why it ended."""
        batch = self._read(batch_id)
        if batch.status in ENDED:
            return "answered"
        with self._database.begin() as session:
            answered = set(session.scalars(select(Line.number).where(Line.batch_id == batch_id)))
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

    async def _make(self, batch: Batch, request: Request) -> Answer:
        """One line's answer, however long its turn takes; errors are answers too."""
        attempts = 0
        images: Images | None = None  # made, but not stored yet
        while True:
            try:
                images = images or await make(self._service, self._service.engine, request.order, batch.owner)
                answer = await respond(self._service, images, batch.links, self._settings.batch_link_seconds)
            except Overloaded as error:
                await asyncio.sleep(error.retry_after * random.uniform(0.5, 1.5))
            except (TimedOut, Unavailable):
                # Others came first, the server is draining, or the store of images is away.
                await asyncio.sleep(random.uniform(0.5, 1.5))
            except ServiceError as error:
                attempts += 1
                if not isinstance(error, GenerationFailed) or attempts == ATTEMPTS:
                    status, body, _ = to_openai(error)
                    return Answer(
                        request.number, True, _text(batch.id, request.number, request.custom_id, status, body)
                    )
            else:
                text = _text(
                    batch.id, request.number, request.custom_id, 200, answer.model_dump(mode="json", exclude_none=True)
                )
                usage = images.usage
                return Answer(request.number, False, text, usage.input_tokens, usage.output_tokens)

    def _keep(self, batch_id: str, answers: Sequence[Answer]) -> Outcome | None:
        """Keep answers; returns why no further line should begin, if so."""
        with self._database.begin() as session:
            batch = session.get_one(Batch, batch_id, with_for_update=True)
            if batch.status in ENDED:
                return "answered"  # by another server, which took this one for dead
            numbers = [answer.number for answer in answers]
            known = select(Line.number).where(Line.batch_id == batch_id, Line.number.in_(numbers))
            before = set(session.scalars(known)) if numbers else set()
            new = [answer for answer in answers if answer.number not in before]
            if new:
                rows = [{"batch_id": batch_id, "number": a.number, "failed": a.failed, "answer": a.text} for a in new]
                session.execute(insert(Line), rows)
            batch.completed += sum(not answer.failed for answer in new)
            batch.failed += sum(answer.failed for answer in new)
            batch.input_tokens += sum(answer.input_tokens for answer in new)
            batch.output_tokens += sum(answer.output_tokens for answer in new)
            if batch.status == "cancelling":
                return "cancelled"
            return "expired" if time.time() >= batch.expires_at else None

    def _finalize(self, batch_id: str, outcome: Outcome) -> Outcome:
        """Nothing can be cancelled any more; what was is told apart here."""
        with self._database.begin() as session:
            batch = session.get_one(Batch, batch_id, with_for_update=True)
            if batch.status == "cancelling":
                return "cancelled"
            if batch.status == "in_progress":
                batch.status = "finalizing"
                batch.finalizing_at = int(time.time())
        return outcome

    def _write(self, batch_id: str, outcome: Outcome) -> None:
        """Write the files in the order of the input, and end the batch in the transaction that makes them known."""
        batch = self._read(batch_id)
        if batch.status in ENDED:
            return
        written, failed = new_id("file-"), new_id("file-")  # new ones each time: nobody overwrites what is known
        counts = {written: 0, failed: 0}
        with self._files.writing(written) as output, self._files.writing(failed) as errors:
            answers = self._answers(batch_id)
            upcoming = next(answers, None)
            for number, line in self._lines(batch):
                if upcoming is not None and upcoming.number == number:
                    text, is_error = upcoming.answer, upcoming.failed
                    upcoming = next(answers, None)
                else:
                    text, is_error = _unanswered(batch_id, number, _custom_id(line), outcome), True
                (errors if is_error else output).write(text.encode() + b"\n")
                counts[failed if is_error else written] += 1
        if self._finish(batch_id, outcome, written, failed, counts):
            counts = {file_id: 0 for file_id, count in counts.items() if not count}
        for file_id in counts:
            self._files.path(file_id).unlink(missing_ok=True)

    def _finish(self, batch_id: str, outcome: Outcome, written: str, failed: str, counts: Mapping[str, int]) -> bool:
        """End a batch with its files; false when another server has done so."""
        now = int(time.time())
        with self._database.begin() as session:
            batch = session.get_one(Batch, batch_id, with_for_update=True)
            if batch.status in ENDED:
                return False
            for file_id, name in ((written, "output"), (failed, "error")):
                if counts[file_id]:
                    session.add(
                        File(
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
            session.execute(delete(Line).where(Line.batch_id == batch_id))
            self._end(session, batch, "completed" if outcome == "answered" else outcome, now)
        return True

    def _fail(self, batch_id: str, complaints: Sequence[Complaint]) -> None:
        """End a batch that cannot be made."""
        with self._database.begin() as session:
            batch = session.get_one(Batch, batch_id, with_for_update=True)
            if batch.status in ENDED:
                return
            batch.errors = [vars(complaint) for complaint in complaints]
            session.execute(delete(Line).where(Line.batch_id == batch_id))
            self._end(session, batch, "failed", int(time.time()))

    # Lines

    def _read(self, batch_id: str) -> Batch:
        with self._database.begin() as session:
            return session.get_one(Batch, batch_id)

    def _requests(self, batch: Batch, answered: set[int]) -> Iterator[Request | Answer]:
        """The lines without an answer, in order. One whose model is gone since the check is answered by that."""
        for number, line in self._lines(batch):
            if number in answered:
                continue
            found = self._parse(batch.id, number, line)
            if isinstance(found, Request):
                yield found
            else:
                kind = "invalid_request_error"
                body = {"message": found.message, "type": kind, "param": found.param, "code": found.code}
                yield Answer(number, True, _text(batch.id, number, _custom_id(line), 404, {"error": body}))

    def _lines(self, batch: Batch) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank, and their numbers from 1. The last one may be over its limit, and cut."""
        try:
            with self._files.path(batch.input_file_id).open("rb") as file:
                for number in itertools.count(1):
                    line = file.readline(self._settings.max_body_bytes + 1)
                    self._workflows.wait(0)
                    if line.strip():
                        yield number, line
                    if not line or len(line) > self._settings.max_body_bytes:
                        return
        except FileNotFoundError:
            raise InputGone from None

    def _parse(self, batch_id: str, number: int, line: bytes) -> Request | Complaint:
        """What a line asks for, with every choice made, or why it cannot be."""
        if len(line) > self._settings.max_body_bytes:
            return Complaint("line_too_long", f"the line is over {self._settings.max_body_bytes} bytes", number, None)
        try:
            read = BatchLine.model_validate_json(line)
            body = read.body
            if body.stream or body.partial_images:
                raise InvalidRequest("a batch does not stream", "body.stream", "invalid_value")
            if body.response_format == "b64_json":
                raise InvalidRequest("a batch answers with links", "body.response_format", "invalid_value")
            if body.timeout is not None:
                raise InvalidRequest("a batch takes its time", "body.timeout", "invalid_value")
            if body.priority == "interactive":
                raise InvalidRequest("a batch waits for interactive work", "body.priority", "invalid_value")
            order = Order.of(body, self._service.card(body.model))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            if first["type"] == "json_invalid":
                return Complaint("invalid_json_line", "the line is not JSON", number, None)
            param = ".".join(map(str, first["loc"])) or None
            code = {"method": "invalid_method", "url": "invalid_url"}.get(param or "", "invalid_request")
            return Complaint(code, f"{param or 'the line'}: {first['msg']}", number, param)
        except ServiceError as error:
            return Complaint(error.code or "invalid_request", error.message, number, error.param)
        if body.seed is None:
            count = len(order.seeds)
            drawn = int.from_bytes(_digest(batch_id, number)) % (MAX_SEED - count)
            order = replace(order, seeds=range(drawn, drawn + count))
        return Request(number, read.custom_id, replace(order, priority=Priority.BATCH, timeout=float(WINDOW_SECONDS)))

    def _end(self, session: Session, batch: Batch, status: str, now: int) -> None:
        """The last status of a batch, and the event that tells of it."""
        batch.status = status
        setattr(batch, f"{status}_at", now)
        self._webhooks.announce(session, batch.owner, f"batch.{status}", batch.id, now)

    def _answers(self, batch_id: str) -> Iterator[Line]:
        """All answers by number, some at a time."""
        last = 0
        while True:
            rows = select(Line).where(Line.batch_id == batch_id, Line.number > last).order_by(Line.number).limit(PAGE)
            with self._database.begin() as session:
                found = session.scalars(rows).all()
            if not found:
                return
            yield from found
            last = found[-1].number


def _digest(batch_id: str, number: int) -> bytes:
    return hashlib.blake2b(f"{batch_id} {number}".encode(), digest_size=12).digest()


def _custom_id(line: bytes) -> str:
    custom_id: str = json.loads(line)["custom_id"]
    return custom_id


def _text(batch_id: str, number: int, custom_id: str, status: int, body: Mapping[str, Any]) -> str:
    """A line of the output or error file, for what a request was answered with."""
    request_id = f"req_{secrets.token_hex(12)}"
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line(batch_id, number, custom_id, response, None)


def _unanswered(batch_id: str, number: int, custom_id: str, outcome: Outcome) -> str:
    """A line of the error file, for a request that was not made."""
    message = f"the batch was {outcome} before this request was made"
    return _line(batch_id, number, custom_id, None, {"code": f"batch_{outcome}", "message": message})


def _line(batch_id: str, number: int, custom_id: str, response: object, error: object) -> str:
    line_id = f"batch_req_{_digest(batch_id, number).hex()}"
    return json.dumps({"id": line_id, "custom_id": custom_id, "response": response, "error": error})
