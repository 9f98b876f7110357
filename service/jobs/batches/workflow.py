"""The durable workflow of a batch: validate the input file, answer its lines, write the output files.

The answer to a line is a row whose key is the line, added in the transaction that counts it. So each line is answered
once, whenever the process is killed and however often a step starts again. A kill may cause an image to be generated
twice, but with the same seed: a line without a seed gets one from its batch and number.

A line is parsed once to validate the whole file before any image is generated, and again when it is answered. The
input file stays its only durable form: neither memory nor the database grows with the batch, and a model may be
unloaded in between.
"""

import asyncio
import concurrent.futures
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence

from service.backoff import backoff
from service.errors import GenerationFailed, ServiceError, TimedOut, Unavailable, quoted, to_openai
from service.images.service import GeneratedImages, ImageService
from service.jobs.batches.line_parser import BODY, LineRequest, parse
from service.jobs.batches.lines import LineAnswer, LineError, Outcome, custom_id_of, numbered_lines, unanswered
from service.jobs.jobs import Jobs
from service.jobs.tables import ENDED, BatchRow
from service.observability.request_id import new_request_id
from service.settings import Settings

log = logging.getLogger(__name__)

MAX_LINES = 50_000
MAX_ERRORS = 100  # reported of an invalid file
SIDE_BY_SIDE = 4  # batches that one server works on at a time
RECORD_SECONDS = 0.5  # between two transactions; so long an answer may exist in memory only
ATTEMPTS = 3  # for a line on which the model or the server fails


class InputFileGone(Exception):
    """The input file does not exist any more."""


class BatchWorkflow:
    """Answers the batches of all owners on this server's engine."""

    def __init__(self, images: ImageService, jobs: Jobs, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the one that the engine runs on. Defines the workflow, so create it before the jobs start."""
        self._images = images
        self._settings = settings
        self._store = jobs.batches
        self._files = jobs.files
        self._workflows = jobs.workflows
        self._loop = loop
        jobs.workflows.define("batch", self._run, SIDE_BY_SIDE)

    def _run(self, batch_id: str) -> None:
        step = self._workflows.step
        try:
            if step("check", lambda: self._validate(batch_id)):
                outcome = step("answer", lambda: self._answer(batch_id))
                step("write", lambda: self._write(batch_id, outcome))
        except InputFileGone:
            error = LineError("input_file_gone", "the input file does not exist any more", None, "input_file_id")
            step("fail", lambda: self._fail(batch_id, [error]))
        except Exception:
            log.exception("%s failed", batch_id)
            message = f"the server failed; its log has the error under {batch_id}"
            step("fail", lambda: self._fail(batch_id, [LineError("server_error", message, None, None)]))

    # Validation

    def _validate(self, batch_id: str) -> bool:
        """Read the whole file once. Returns whether its lines can be answered; fails the batch if not."""
        batch = self._store.read(batch_id)
        if batch.status not in ("validating", "cancelling"):
            return batch.status not in ENDED  # the end of this step was not recorded
        errors, total, models = self._find_errors(batch)
        if errors:
            self._fail(batch_id, errors)
            return False
        self._store.start(batch_id, total, models.pop() if len(models) == 1 else None)
        return True

    def _find_errors(self, batch: BatchRow) -> tuple[list[LineError], int, set[str]]:
        """Return the first errors of a file, its number of lines, and the models that they name."""
        errors: list[LineError] = []
        models: set[str] = set()
        seen: set[bytes] = set()  # digests, because a custom_id may be long
        total = 0
        for number, line in self._lines(batch):
            if len(errors) == MAX_ERRORS:
                break
            total += 1
            if total > MAX_LINES:
                errors.append(LineError("too_many_lines", f"a batch has {MAX_LINES} lines at most", number, None))
                break
            try:
                parsed = parse(self._images, self._settings, batch, number, line)
            except ServiceError as error:
                errors.append(LineError(error.code or "invalid_request", error.message, number, error.param))
                continue
            digest = hashlib.blake2b(parsed.custom_id.encode(), digest_size=16).digest()
            if digest in seen:
                message = f"custom_id {quoted(parsed.custom_id)} occurs twice; give each line its own"
                errors.append(LineError("duplicate_custom_id", message, number, "custom_id"))
            seen.add(digest)
            models.add(parsed.generation.model)
        if not total:
            errors.append(LineError("empty_file", "the file has no lines", None, "input_file_id"))
        return errors, total, models

    # Answers

    def _answer(self, batch_id: str) -> Outcome:
        """Answer every line that has no answer yet. Returns why it stopped."""
        batch = self._store.read(batch_id)
        if batch.status in ENDED:
            return "answered"
        at_once = self._settings.jobs.concurrent_lines_per_batch
        lines = self._requests(batch, self._store.answered(batch_id))
        pending: set[concurrent.futures.Future[LineAnswer]] = set()
        answers: list[LineAnswer] = []
        recorded = -RECORD_SECONDS
        outcome: Outcome | None = None
        try:
            while True:
                if time.monotonic() - recorded >= RECORD_SECONDS or len(answers) >= at_once:
                    outcome = self._store.record(batch_id, answers)
                    answers = []
                    recorded = time.monotonic()
                if outcome is not None:
                    return self._store.finalize(batch_id, outcome)
                while len(pending) + len(answers) < at_once:
                    request = next(lines, None)
                    if request is None:
                        break
                    if isinstance(request, LineAnswer):
                        answers.append(request)
                    else:
                        pending.add(asyncio.run_coroutine_threadsafe(self._generate(batch, request), self._loop))
                if not pending and len(answers) < at_once:
                    return self._store.finalize(batch_id, self._store.record(batch_id, answers) or "answered")
                done, pending = concurrent.futures.wait(pending, RECORD_SECONDS, concurrent.futures.FIRST_COMPLETED)
                self._workflows.wait(0)
                answers += [future.result() for future in done]
        finally:
            for future in pending:
                future.cancel()

    async def _generate(self, batch: BatchRow, request: LineRequest) -> LineAnswer:
        """Return the answer to one line, which may be an error, however long it waits for a device."""
        request_id, attempts, pauses = new_request_id(), 0, backoff(1.0, 1.0, jitter=0.5)
        images: GeneratedImages | None = None  # generated, but not stored yet
        while True:
            try:
                images = images or await self._images.generate(request.generation, request.output, patient=True)
                answer = await self._images.links(images, batch.links, self._settings.jobs.batch_link_seconds)
            except (TimedOut, Unavailable):
                # Other requests came first, the server is draining, or the store of images is unavailable.
                await asyncio.sleep(next(pauses))
            except ServiceError as error:
                attempts += 1
                if not isinstance(error, GenerationFailed) or attempts == ATTEMPTS:
                    return _error_answer(request_id, batch, request.number, request.custom_id, error)
            except Exception:  # of a safety check or a signature, for example; the other lines continue
                named = {"request_id": request_id}
                log.exception("%s, line %d of %s, failed", request_id, request.number, batch.id, extra=named)
                attempts += 1
                if attempts == ATTEMPTS:
                    failed = ServiceError(f"the server failed; its log has the error under {request_id}")
                    return _error_answer(request_id, batch, request.number, request.custom_id, failed)
                await asyncio.sleep(next(pauses))
            else:
                body = answer.model_dump(mode="json", exclude_none=True)
                return LineAnswer.of(request_id, batch.id, request.number, request.custom_id, 200, body, images.usage)

    def _requests(self, batch: BatchRow, answered: set[int]) -> Iterator[LineRequest | LineAnswer]:
        """Yield the lines without an answer in order. A line that became invalid is answered with its error."""
        for number, line in self._lines(batch):
            if number in answered:
                continue
            try:
                yield parse(self._images, self._settings, batch, number, line)
            except ServiceError as error:
                error.param = error.param and error.param.removeprefix(BODY)  # the answer to the request itself
                yield _error_answer(new_request_id(), batch, number, custom_id_of(line), error)

    # Output files

    def _write(self, batch_id: str, outcome: Outcome) -> None:
        """End a batch with files in the order of the input."""
        batch = self._store.read(batch_id)
        if batch.status not in ENDED:
            self._end(batch_id, self._output(batch, outcome), "completed" if outcome == "answered" else outcome)

    def _fail(self, batch_id: str, errors: Sequence[LineError]) -> None:
        """End a batch that cannot be answered, or not to its end, with files of the answers that there are."""
        if self._store.read(batch_id).status not in ENDED:
            answers = ((row.answer, row.failed) for row in self._store.answers(batch_id))
            self._end(batch_id, answers, "failed", errors)

    def _end(
        self, batch_id: str, lines: Iterable[tuple[str, bool]], status: str, errors: Sequence[LineError] = ()
    ) -> None:
        """Write the lines, and end the batch in the transaction that makes the files visible."""
        written = self._store.write_files(lines)
        ended = self._store.end(batch_id, status, errors, *written)
        for file in written:
            if not (ended and file.lines):
                self._files.path(file.id).unlink(missing_ok=True)

    def _output(self, batch: BatchRow, outcome: Outcome) -> Iterator[tuple[str, bool]]:
        """Yield the answer to each line of the input, and whether it is an error."""
        answers = self._store.answers(batch.id)
        upcoming = next(answers, None)
        for number, line in self._lines(batch):
            if upcoming is not None and upcoming.number == number:
                yield upcoming.answer, upcoming.failed
                upcoming = next(answers, None)
            else:
                yield unanswered(batch.id, number, line, outcome), True

    def _lines(self, batch: BatchRow) -> Iterator[tuple[int, bytes]]:
        """Yield the lines that are not blank, with their numbers. Raises InputFileGone, Stopping at a shutdown."""
        try:
            for number, line in numbered_lines(
                self._files.path(batch.input_file_id), self._settings.http.max_body_bytes
            ):
                self._workflows.wait(0)
                if line.strip():
                    yield number, line
        except FileNotFoundError:
            raise InputFileGone from None


def _error_answer(request_id: str, batch: BatchRow, number: int, custom_id: str, error: ServiceError) -> LineAnswer:
    status, body, _ = to_openai(error)
    return LineAnswer.of(request_id, batch.id, number, custom_id, status, body)
