"""The students that jobs have made, in the engine: what the database says is loaded, the newest first."""

import asyncio
import logging
import threading
from contextlib import suppress
from pathlib import Path

from sqlalchemy import select

from service.engine.engine import Engine
from service.errors import InvalidRequest, NotFound, ServiceError
from service.jobs.database import Database
from service.jobs.tables import Job

log = logging.getLogger(__name__)

PERIOD = 2.0  # seconds after which the student of another server's job is served here too


class Students:
    """Keeps the engine at what the jobs have made, at most so many students at a time."""

    def __init__(self, database: Database, data: Path, at_most: int) -> None:
        self._database = database
        self._data = data
        self._at_most = at_most
        self._served: set[str] = set()
        self._refused: set[str] = set()  # by the engine; not tried again before the next start
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
        """Unload what is gone or no longer among the newest, load what is new; what cannot be now is tried again."""
        async with self._syncing:
            try:
                wanted = await asyncio.to_thread(self._newest)
                for name in self._served - wanted.keys():
                    with suppress(NotFound):  # an administrator was faster
                        await self._engine.unload(name)
                    self._served.discard(name)
                for name in wanted.keys() - self._served - self._refused:
                    await self._load(wanted[name], name)
            except ServiceError as error:
                log.warning("put off: %s", error.message)

    async def _load(self, folder: Path, name: str) -> None:
        try:
            await self._engine.load(folder, name)
            self._served.add(name)
        except InvalidRequest as error:
            log.error("%s cannot be served: %s", name, error.message)
            self._refused.add(name)

    def _newest(self) -> dict[str, Path]:
        """Folders of the students to serve, by name: those made last; a job ends a moment after its student is made."""
        with self._database.begin() as session:
            made = (
                select(Job.id, Job.fine_tuned_model)
                .where(Job.fine_tuned_model.is_not(None), Job.deleted_at.is_(None))
                .order_by(Job.finished_at.desc().nulls_first(), Job.created_at.desc(), Job.id)
                .limit(self._at_most)
            )
            rows = session.execute(made).all()
        return {name: student_folder(self._data, job) for job, name in rows if name}


def run_folder(data: Path, job: str) -> Path:
    """Where a job runs."""
    return data / "distillations" / job / "run"


def student_folder(data: Path, job: str) -> Path:
    """Where its student is."""
    return run_folder(data, job) / "student"
