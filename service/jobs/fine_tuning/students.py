"""`Students`: loads the newest students of jobs into the engine."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import select

from service.backoff import backoff
from service.engine.catalog import ModelCatalog
from service.engine.stored_models import FIRST_PAUSE, LONGEST_PAUSE
from service.errors import NotFound, ServiceError
from service.jobs.database import Database
from service.jobs.fine_tuning.events import Level, record_event
from service.jobs.fine_tuning.job_folder import JobFolder
from service.jobs.tables import JobRow

log = logging.getLogger(__name__)

PERIOD = 2.0  # seconds after which this server loads the student of another server's job


class _Failure(NamedTuple):
    """Why a student could not be loaded, and when the next attempt is due."""

    reason: str
    pauses: Iterator[float]  # in seconds, before further attempts
    due: float  # on the clock


class Students:
    """Keeps the newest students of the database loaded, at most so many at a time."""

    def __init__(
        self, database: Database, data: Path, at_most: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._data = data
        self._at_most = at_most
        self._clock = clock
        self._served: set[str] = set()
        self._failures: dict[str, _Failure] = {}
        self._events: deque[tuple[str, str, Level]] = deque()  # not recorded yet: job, message and level
        self._syncing = asyncio.Lock()
        self._started = threading.Event()
        self._following: asyncio.Task[None] | None = None

    async def start(self, catalog: ModelCatalog) -> None:
        """Load the newest students now, and new ones from now on."""
        self._catalog = catalog
        self._loop = asyncio.get_running_loop()
        await self._sync()
        self._following = asyncio.create_task(self._follow())
        self._started.set()

    async def stop(self) -> None:
        """Load no further students."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])

    def serve(self) -> None:
        """Load a new student and wait for it. Call this from threads other than the event loop's."""
        self._started.wait()
        asyncio.run_coroutine_threadsafe(self._sync(), self._loop).result()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await self._sync()
            except Exception:
                log.exception("students could not be updated; trying again")

    async def _sync(self) -> None:
        """Unload students that are deleted or no longer among the newest; load new ones, and failed ones that are due.

        Events that cannot be recorded, because the database is unavailable, are recorded by a later call.
        """
        async with self._syncing:
            try:
                wanted = await asyncio.to_thread(self._newest)
                for name in self._served - wanted.keys():
                    with suppress(NotFound):  # an administrator has unloaded it
                        await self._catalog.unload(name)
                    self._served.discard(name)
                self._failures = {name: failure for name, failure in self._failures.items() if name in wanted}
                for name, job in wanted.items():
                    if name not in self._served:
                        await self._load(job, name)
                while self._events:
                    await asyncio.to_thread(self._record, *self._events[0])
                    self._events.popleft()
            except ServiceError as error:
                log.warning("students are updated later: %s", error.message)

    async def _load(self, job: str, name: str) -> None:
        """Load a student if its next attempt is due. Its job gets an event for a failure, and for success after one."""
        failed = self._failures.get(name)
        if failed is not None and self._clock() < failed.due:
            return
        folder = JobFolder.of(self._data, job).student
        try:
            await self._catalog.load(folder, name)
        except ServiceError as error:
            pauses = backoff(FIRST_PAUSE, LONGEST_PAUSE) if failed is None else failed.pauses
            pause = next(pauses)
            self._failures[name] = _Failure(error.message, pauses, self._clock() + pause)
            log.warning("%s could not be loaded; next attempt in %.0f s: %s", name, pause, error.message)
            if failed is None or failed.reason != error.message:
                reason = error.message.replace(str(folder), "its folder")
                message = f"The student could not be loaded and is not served yet; loading is tried again: {reason}"
                self._events.append((job, message, "warn"))
            return
        self._served.add(name)
        if self._failures.pop(name, None) is not None:
            self._events.append((job, "The student is loaded and served now.", "info"))

    def _record(self, job: str, message: str, level: Level) -> None:
        with self._database.begin() as session:
            record_event(session, session.get_one(JobRow, job, with_for_update=True), message, level)

    def _newest(self) -> dict[str, str]:
        """Return the students to serve and their jobs. The newest is that of a job that is about to end, if any."""
        with self._database.read() as session:
            newest = (
                select(JobRow.id, JobRow.fine_tuned_model)
                .where(JobRow.fine_tuned_model.is_not(None), JobRow.deleted_at.is_(None))
                .order_by(JobRow.finished_at.desc().nulls_first(), JobRow.created_at.desc(), JobRow.id)
                .limit(self._at_most)
            )
            rows = session.execute(newest).all()
        return {name: job for job, name in rows if name}
