"""`Workflows`: durable workflows, which this or another process resumes after a crash.

DBOS stores them. A workflow is a function of one key, which is also its id, so a second start has no effect. It has
steps: a completed step never runs again, but an interrupted one does, so a step must tolerate its own traces. Servers
on one PostgreSQL share the work. Each increments a counter in its row of `executors`. If a server finds a counter
unchanged several times in a row, it considers that server dead and resumes its workflows. Clocks that jump or differ
do not affect this, and neither does an outage of the database.
"""

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from sqlalchemy import URL, delete, select, update
from sqlalchemy.exc import OperationalError

from service.backoff import backoff
from service.errors import StartError, Unavailable
from service.jobs.database import LONGEST_PAUSE, Database, Stopping
from service.jobs.tables import ExecutorRow

T = TypeVar("T")

log = logging.getLogger(__name__)

VERSION = "1"  # of the workflows; a server does not resume workflows of another version
POLL_SECONDS = 1.0  # each queue takes 3 ms of CPU time for it
KEPT_SECONDS = 7 * 86_400  # for which the records of workflows that have ended are kept
SWEPT_AT_ONCE = 1000
LOOKS = 5  # in a row with an unchanged counter, after which a server is considered dead
_ONE = threading.Lock()  # a process has one DBOS


class Interrupted(BaseException):
    """Raised in a workflow if a step cannot be recorded. Not an `Exception`, so that the workflow stays unfinished."""


class Workflows:
    """The workflows of this process. Every method blocks: call them off the event loop."""

    def __init__(self, database: Database, folder: Path) -> None:
        """Their state is in the PostgreSQL database, or in a file beside that of SQLite. Nothing runs yet."""
        self.stopping = threading.Event()  # set when the server shuts down
        self._database = database
        beside = URL.create("sqlite", database=str(folder / "workflows.sqlite"))
        self._url = beside if database.is_sqlite else database.url
        self._executor = f"server-{secrets.token_hex(8)}"
        self._others: dict[str, tuple[int, int]] = {}  # counters of other servers, and looks since a change
        self._functions: dict[str, tuple[Callable[[str], None], int]] = {}
        self._queues: list[str] = []  # workflows that this process runs
        self._durable: dict[str, Callable[[str], None]] = {}
        self._interrupted: dict[str, str] = {}  # keys and names of workflows to resume here
        self._active = 0
        self._changed = threading.Condition()

    def define(self, name: str, function: Callable[[str], None], side_by_side: int, runs: bool = True) -> None:
        """Define a workflow before the start. Each process runs `side_by_side` of its kind at a time.

        Without `runs`, this process only starts such workflows, and other processes run them.
        """
        self._functions[name] = function, side_by_side
        if runs:
            self._queues.append(name)

    def start(self) -> None:
        """Run new workflows and those of dead processes. Raises StartError if this process runs workflows already."""
        # Imported here, because it is slow and not needed without a data folder.
        from dbos import DBOS, DBOSPortableJSONSerializer

        if not _ONE.acquire(blocking=False):
            raise StartError("a process has one DBOS: only one of its servers can have a data folder")
        logger = logging.getLogger("dbos")
        logger.addHandler(logging.NullHandler())  # keeps DBOS from printing outside the server's log
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
            # Resumed without limit: steps are safe to repeat, and no job may be lost.
            durable = DBOS.workflow(name=name, max_recovery_attempts=None)(self._counted(name, function))
            self._durable[name] = durable
        DBOS.listen_queues(self._queues)
        self.beat()
        DBOS.launch()
        for name, (_, side_by_side) in self._functions.items():
            DBOS.register_queue(name, worker_concurrency=side_by_side, polling_interval_sec=POLL_SECONDS)

    def begin(self, name: str, key: str) -> None:
        """Start a workflow now or when there is room, unless it was started before.

        If it cannot be recorded, for example on a full disk, a periodic task tries again.
        """
        from dbos import DBOS, SetWorkflowID

        try:
            with SetWorkflowID(key):
                DBOS.enqueue_workflow(name, self._durable[name], key)
        except OperationalError as error:
            log.warning("%s starts later: %s", key, error)

    def step(self, name: str, work: Callable[[], T]) -> T:
        """Inside a workflow: call `work`, or return its recorded result. Results are JSON values.

        `work` is retried while the database, the disk or a store is unavailable.
        """
        from dbos import DBOS

        try:
            return DBOS.run_step({"name": name}, lambda: self._retry(name, work))
        except OperationalError as error:  # of DBOS, for example on a full disk; `work` raises Unavailable instead
            raise Interrupted from error

    def _retry(self, name: str, work: Callable[[], T]) -> T:
        pauses = backoff(0.2, LONGEST_PAUSE)
        while True:
            try:
                return work()
            except (Unavailable, OSError):
                log.exception("%s is retried", name)
                self.wait(next(pauses))

    def beat(self) -> None:
        """Increment this process's counter, and remove processes that are dead. Called every few seconds."""
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
                log.warning("%s is dead; its workflows are resumed", other)
                with self._database.begin() as session:
                    session.execute(delete(ExecutorRow).where(ExecutorRow.id == other, ExecutorRow.beats == beats))

    def adopt(self) -> None:
        """Resume every workflow that was interrupted here or whose process is dead.

        Blocks while the database of DBOS is unavailable, and for a while after, so it must not delay `beat`.
        """
        from dbos import DBOS

        for key, name in list(self._interrupted.items()):
            DBOS.resume_workflow(key, queue_name=name)
            del self._interrupted[key]
        pending = DBOS.list_workflows(status="PENDING", load_input=False, load_output=False)
        with self._database.read() as session:  # after the list: a server has a counter before it takes a workflow
            alive = {self._executor, *session.scalars(select(ExecutorRow.id))}
        if dead := {each.executor_id for each in pending if each.executor_id} - alive:
            # Takes workflows only from dead executors, so that two concurrent calls resume each workflow once.
            DBOS._recover_pending_workflows(sorted(dead))

    def sweep(self, now: int) -> None:
        """Delete the records of workflows that ended long ago. What they worked on has ended too, or begins others."""
        from dbos import DBOS

        before = datetime.fromtimestamp(now - KEPT_SECONDS, UTC).isoformat()
        ended = DBOS.list_workflows(
            status=["SUCCESS", "ERROR"],
            completed_before=before,
            limit=SWEPT_AT_ONCE,
            load_input=False,
            load_output=False,
        )
        DBOS.delete_workflows([each.workflow_id for each in ended])

    def stop(self) -> None:
        """Stop running workflows. The next start, or another server, resumes them."""
        from dbos import DBOS

        self.stopping.set()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._active, timeout=30):
                log.warning("%d workflows do not stop; they will be resumed", self._active)
        DBOS.destroy(destroy_registry=True)
        _ONE.release()
        with contextlib.suppress(Unavailable), self._database.begin() as session:  # or others consider it dead soon
            session.execute(delete(ExecutorRow).where(ExecutorRow.id == self._executor))

    def wait(self, seconds: float) -> None:
        """Inside a workflow: sleep. Raises Stopping if the server shuts down meanwhile."""
        if self.stopping.wait(seconds):
            raise Stopping

    def _counted(self, name: str, function: Callable[[str], None]) -> Callable[[str], None]:
        """Return the function, counted while it runs."""

        def run(key: str) -> None:
            with self._changed:
                if self.stopping.is_set():
                    raise Stopping
                self._active += 1
            try:
                function(key)
            except Interrupted as interrupted:
                log.warning("%s is resumed later: %s", key, interrupted.__cause__)
                self._interrupted[key] = name
                raise
            finally:
                with self._changed:
                    self._active -= 1
                    self._changed.notify_all()

        return run
