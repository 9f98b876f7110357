"""The students that jobs have made, in the engine: what the database says is loaded, the newest first."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import select

from service.engine.engine import Engine
from service.engine.loaded_models import FIRST_PAUSE, LONGEST_PAUSE
from service.errors import NotFound, ServiceError
from service.jobs.database import Database
from service.jobs.fine_tuning.events import Level, record_event
from service.jobs.tables import JobRow

log = logging.getLogger(__name__)

PERIOD = 2.0  # seconds after which the student of another server's job is served here too


class _Failure(NamedTuple):
    """Why a student could not be loaded, and when the next attempt is due."""

    reason: str
    pause: float  # seconds
    due: float  # on the clock


class Students:
    """Keeps the engine at what the jobs have made, at most so many students at a time."""

    def __init__(
        self, database: Database, data: Path, at_most: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._data = data
        self._at_most = at_most
        self._clock = clock
        self._served: set[str] = set()
        self._failures: dict[str, _Failure] = {}
        self._syncing = asyncio.Lock()
        self._started = threading.Event()
        self._following: asyncio.Task[None] | None = None

    async def start(self, engine: Engine) -> None:
        """Load the students that there are, and look for new ones from now on."""
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        await self._sync()
        self._following = asyncio.create_task(self._follow())
        self._started.set()

    async def stop(self) -> None:
        """Look no more."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])

    def serve(self) -> None:
        """Load what has just been made, and wait for it. From threads other than the event loop's."""
        self._started.wait()
        asyncio.run_coroutine_threadsafe(self._sync(), self._loop).result()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await self._sync()
            except Exception:
                log.exception("the students could not be looked at; it is tried again")

    async def _sync(self) -> None:
        """Unload students that are gone or no longer among the newest; load new ones, and failed ones that are due."""
        async with self._syncing:
            try:
                wanted = await asyncio.to_thread(self._newest)
                for name in self._served - wanted.keys():
                    with suppress(NotFound):  # an administrator was faster
                        await self._engine.unload(name)
                    self._served.discard(name)
                self._failures = {name: failure for name, failure in self._failures.items() if name in wanted}
                for name, job in wanted.items():
                    if name not in self._served:
                        await self._load(job, name)
            except ServiceError as error:
                log.warning("put off: %s", error.message)

    async def _load(self, job: str, name: str) -> None:
        """Load a student if its next attempt is due, and report the outcome in the events of its job."""
        failed = self._failures.get(name)
        if failed is not None and self._clock() < failed.due:
            return
        folder = student_folder(self._data, job)
        try:
            await self._engine.load(folder, name)
        except ServiceError as error:
            pause = FIRST_PAUSE if failed is None else min(2 * failed.pause, LONGEST_PAUSE)
            self._failures[name] = _Failure(error.message, pause, self._clock() + pause)
            log.warning("%s could not be loaded; next attempt in %.0f s: %s", name, pause, error.message)
            if failed is None or failed.reason != error.message:
                reason = error.message.replace(str(folder), "its folder")
                message = f"The student could not be loaded and is not served yet; loading is tried again: {reason}"
                await asyncio.to_thread(self._tell, job, message, "warn")
            return
        self._served.add(name)
        if self._failures.pop(name, None) is not None:
            await asyncio.to_thread(self._tell, job, "The student is loaded and served now.", "info")

    def _tell(self, job: str, message: str, level: Level) -> None:
        with self._database.begin() as session:
            record_event(session, session.get_one(JobRow, job, with_for_update=True), message, level)

    def _newest(self) -> dict[str, str]:
        """Jobs whose students to serve, by the student's name: those made last; a job ends a moment after that."""
        with self._database.read() as session:
            made = (
                select(JobRow.id, JobRow.fine_tuned_model)
                .where(JobRow.fine_tuned_model.is_not(None), JobRow.deleted_at.is_(None))
                .order_by(JobRow.finished_at.desc().nulls_first(), JobRow.created_at.desc(), JobRow.id)
                .limit(self._at_most)
            )
            rows = session.execute(made).all()
        return {name: job for job, name in rows if name}


def run_folder(data: Path, job: str) -> Path:
    """Where a job runs."""
    return data / "distillations" / job / "run"


def student_folder(data: Path, job: str) -> Path:
    """Where its student is."""
    return run_folder(data, job) / "student"
