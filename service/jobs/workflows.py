"""Durable workflows: what was begun is finished, by this process or by the one that finds it unfinished.

DBOS keeps them. A workflow is a function of one id, and the id is also its own: beginning it twice is beginning it
once. It is made of steps; a step that has ended is not run again, one that was interrupted is, so a step must be
written to find its own traces. Servers on one PostgreSQL share the work: each counts up a row of `executors`, and
the workflows of one that stopped counting are begun again by the others. It has stopped when so many looks in a row
have found the same count: clocks that jump or differ kill nobody, and neither does a database that was away.
"""

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sqlalchemy import URL, delete, select, update
from sqlalchemy.exc import OperationalError

from service.errors import StartError, Unavailable
from service.jobs.database import LONGEST_PAUSE, Database, Stopping
from service.jobs.tables import ExecutorRow

T = TypeVar("T")

log = logging.getLogger(__name__)

VERSION = "1"  # of the workflows; another one leaves unfinished work of this one alone
POLL_SECONDS = 0.5
LOOKS = 5  # that find a server's count unchanged, until it is taken for dead
_ONE = threading.Lock()  # DBOS is of a process


class Interrupted(BaseException):
    """Raised inside a workflow when a step cannot be recorded; no `Exception`, so that it is left unfinished."""


class Workflows:
    """The workflows of this process. Every method blocks: call them off the event loop."""

    def __init__(self, database: Database, folder: Path) -> None:
        """Their state is in the PostgreSQL database, or in a file of its own beside SQLite's. Nothing runs yet."""
        self.stopping = threading.Event()  # set when the server shuts down; what a workflow waits on
        self._database = database
        beside = URL.create("sqlite", database=str(folder / "workflows.sqlite"))
        self._url = beside if database.is_sqlite else database.url
        self._executor = f"server-{secrets.token_hex(8)}"
        self._others: dict[str, tuple[int, int]] = {}  # servers: their count, and looks since it changed
        self._functions: dict[str, tuple[Callable[[str], None], int]] = {}
        self._queues: list[str] = []  # of the workflows that this process runs
        self._durable: dict[str, Callable[[str], None]] = {}
        self._interrupted: dict[str, str] = {}  # workflows of this process, to be begun again, and what they are
        self._active = 0
        self._changed = threading.Condition()

    def define(self, name: str, function: Callable[[str], None], side_by_side: int, runs: bool = True) -> None:
        """A workflow, before the start: its function of an id, and how many of it each process runs at a time.

        Without `runs`, this process leaves it to others; it begins it all the same.
        """
        self._functions[name] = function, side_by_side
        if runs:
            self._queues.append(name)

    def start(self) -> None:
        """Run workflows from now on: new ones, and those that a dead process left."""
        # Here, and not above: a server that keeps nothing does not wait for this import.
        from dbos import DBOS, DBOSPortableJSONSerializer

        if not _ONE.acquire(blocking=False):
            raise StartError("a process has one DBOS: only one of its servers can have a data folder")
        logger = logging.getLogger("dbos")
        logger.addHandler(logging.NullHandler())  # keeps DBOS from writing beside the server's own log
        DBOS(
            config={
                "name": "fgm-service",
                "system_database_url": self._url.render_as_string(hide_password=False),
                "application_version": VERSION,
                "executor_id": self._executor,
                "serializer": DBOSPortableJSONSerializer(),  # its default is pickle
                "log_level": "WARNING",
                "scheduler_polling_interval_sec": 3600.0,  # nothing is scheduled
            }
        )
        for name, (function, _) in self._functions.items():
            # Tried again for ever: steps are safe to repeat, and a job must not be lost to a bad day.
            durable = DBOS.workflow(name=name, max_recovery_attempts=None)(self._counted(name, function))
            self._durable[name] = durable
        DBOS.listen_queues(self._queues)
        self.beat()
        DBOS.launch()
        for name, (_, side_by_side) in self._functions.items():
            DBOS.register_queue(name, worker_concurrency=side_by_side, polling_interval_sec=POLL_SECONDS)

    def begin(self, name: str, key: str) -> None:
        """Begin a workflow for an id, now or when there is room. Nothing happens when it was begun before.

        Nothing happens either when it cannot be noted, on a disk that is full: chores begin again what has not begun.
        """
        from dbos import DBOS, SetWorkflowID

        try:
            with SetWorkflowID(key):
                DBOS.enqueue_workflow(name, self._durable[name], key)
        except OperationalError as error:
            log.warning("%s is begun later: %s", key, error)

    def step(self, name: str, work: Callable[[], T]) -> T:
        """Inside a workflow: do this, or, when it was done before, return what it returned then. JSON values only."""
        from dbos import DBOS

        try:
            return DBOS.run_step({"name": name}, work)
        except OperationalError as error:  # of DBOS: those of `work` are Unavailable. On a full disk, for one
            raise Interrupted from error

    def retrying_step(self, name: str, work: Callable[[], T]) -> T:
        """A step that is tried again while the database, the disk or a store is away."""
        return self.step(name, lambda: self._retry(name, work))

    def _retry(self, name: str, work: Callable[[], T]) -> T:
        pause = 0.2
        while True:
            try:
                return work()
            except (Unavailable, OSError):
                log.exception("%s is put off", name)
                self.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def beat(self) -> None:
        """Say that this process lives, and count out those that have gone silent. To be called every few seconds."""
        with self._database.begin() as session:
            counted = update(ExecutorRow).where(ExecutorRow.id == self._executor).values(beats=ExecutorRow.beats + 1)
            if session.execute(counted.returning(ExecutorRow.id)).first() is None:
                session.add(ExecutorRow(id=self._executor, beats=0))
            others = list(
                session.execute(select(ExecutorRow.id, ExecutorRow.beats).where(ExecutorRow.id != self._executor))
            )
        before, self._others = self._others, {}
        for other, beats in others:
            last, looks = before.get(other, (None, 0))
            looks = looks + 1 if beats == last else 0
            self._others[other] = beats, looks
            if looks >= LOOKS:
                log.warning("%s has gone silent; its workflows are begun again", other)
                with self._database.begin() as session:
                    session.execute(delete(ExecutorRow).where(ExecutorRow.id == other, ExecutorRow.beats == beats))

    def adopt(self) -> None:
        """Begin again every workflow that was interrupted here, or whose process is no longer counted.

        Blocks while DBOS's database is away, and for a while after, so it must not hold up `beat`.
        """
        from dbos import DBOS

        for key, name in list(self._interrupted.items()):
            DBOS.resume_workflow(key, queue_name=name)
            del self._interrupted[key]
        pending = DBOS.list_workflows(status="PENDING", load_input=False, load_output=False)
        with self._database.read() as session:  # after the list: a server is counted before it takes anything
            alive = {self._executor, *session.scalars(select(ExecutorRow.id))}
        if dead := {each.executor_id for each in pending if each.executor_id} - alive:
            # Takes a workflow from a dead executor only, so that two servers that do this at once begin it once.
            DBOS._recover_pending_workflows(sorted(dead))

    def stop(self) -> None:
        """Leave running workflows where they are, for the next start or another server."""
        from dbos import DBOS

        self.stopping.set()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._active, timeout=30):
                log.warning("%d workflows do not stop; they will be begun again", self._active)
        DBOS.destroy(destroy_registry=True)
        _ONE.release()
        with contextlib.suppress(Unavailable), self._database.begin() as session:  # else it is silent soon enough
            session.execute(delete(ExecutorRow).where(ExecutorRow.id == self._executor))

    def wait(self, seconds: float) -> None:
        """Inside a workflow: let time pass. Raises Stopping when the server shuts down meanwhile."""
        if self.stopping.wait(seconds):
            raise Stopping

    def _counted(self, name: str, function: Callable[[str], None]) -> Callable[[str], None]:
        """The function, counted while it runs."""

        def run(key: str) -> None:
            with self._running():
                try:
                    function(key)
                except Interrupted as interrupted:
                    log.warning("%s is begun again later: %s", key, interrupted.__cause__)
                    self._interrupted[key] = name
                    raise

        return run

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._changed:
            if self.stopping.is_set():
                raise Stopping
            self._active += 1
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()
