"""`Jobs`: files, batches and fine-tuning jobs, which survive a restart, and their periodic tasks."""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock

from service.errors import ServiceError, StartError
from service.files import PRIVATE, atomic_write, prepare_data_folder
from service.jobs.batches.store import BatchStore
from service.jobs.database import Database
from service.jobs.file_store import FileStore
from service.jobs.fine_tuning.jobs import FineTuningJobs
from service.jobs.fine_tuning.students import Students
from service.jobs.fine_tuning.workflow import FineTuningWorkflow
from service.jobs.sqlite import check_sqlite
from service.jobs.webhooks import Webhooks
from service.jobs.workflows import LOOKS, Workflows
from service.settings import Settings

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
PeriodicTask = Callable[[int], None]  # called with the time in seconds
SECRET_BYTES = 32  # of the secret that signs links
WRITERS = 8  # requests that write to the database at once
STOP_SECONDS = 10  # that a shutdown waits for a thread, which may itself wait for the database


class Jobs:
    """The durable part of the server. Every method but `write` blocks."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Creates the data folder. Raises StartError if it cannot be created or written."""
        self.folder = folder.absolute()
        prepare_data_folder(self.folder)
        given = settings.jobs.database
        self.database = Database(given.get_secret_value() if given else f"sqlite:///{self.folder / 'jobs.sqlite'}")
        self.workflows = Workflows(self.database, self.folder)
        self.files = FileStore(
            self.database, self.folder / "files", settings.jobs.max_file_bytes, settings.jobs.max_file_bytes_per_key
        )
        self.webhooks = Webhooks(self.database, self.workflows, settings.jobs.webhooks)
        self.batches = BatchStore(
            self.database, self.files, self.workflows, self.webhooks, settings.jobs.max_batches_per_key
        )
        self.students = Students(self.database, self.folder, settings.jobs.max_served_students)
        workflow = FineTuningWorkflow(
            self.database, self.workflows, self.files, self.webhooks, self.students, self.folder, settings
        )
        self.fine_tuning = FineTuningJobs(self.database, self.files, workflow, settings)
        self.periodic_tasks: list[PeriodicTask] = [
            lambda now: self.workflows.adopt(),
            self.files.sweep,
            self.webhooks.begin_due,
            self.batches.begin_lost,
            workflow.begin_waiting,
            workflow.remove_deleted,
            _hourly(self.workflows.sweep),
            _hourly(self.webhooks.sweep),
        ]  # each may run again, and in several servers at once
        self._period = settings.jobs.takeover_seconds / LOOKS
        self._ended = threading.Event()
        self._prepared = False
        # The heartbeat has its own thread: a task may wait for long, and the server must not seem dead meanwhile.
        beat = [lambda now: self.workflows.beat()]
        self._threads = [
            threading.Thread(target=self._repeat, args=(periodic_tasks,), name=f"jobs-{name}", daemon=True)
            for name, periodic_tasks in (("heartbeat", beat), ("tasks", self.periodic_tasks))
        ]
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="jobs-write")
        self.open = False  # whether requests are accepted

    def secret(self) -> bytes:
        """Return random bytes, created once and kept so that signed links stay valid after a restart.

        Raises StartError for an empty or damaged file, because anyone could sign with its contents.
        """
        path = self.folder / "secret"
        try:
            with FileLock(f"{path}.lock"):  # another server may start at the same time
                if not path.exists():
                    with atomic_write(path, PRIVATE) as file:
                        file.write(secrets.token_bytes(SECRET_BYTES))
            secret = path.read_bytes()
        except OSError as error:
            raise StartError(
                f"{path}, which signs links to images, cannot be read or created ({error.strerror}); give it and "
                f"{path.name}.lock to the user that the server runs as"
            ) from None
        if len(secret) < SECRET_BYTES or not any(secret):
            raise StartError(
                f"{path}, which signs links to images, is damaged; restore it from a backup, or delete it: the server "
                "then creates a new secret, and earlier links are no longer valid"
            )
        return secret

    def prepare(self) -> None:
        """Check the databases and migrate them. Raises StartError if they cannot be used."""
        if self.database.is_sqlite:
            check_sqlite(Path(self.database.url.database or ""))
            check_sqlite(self.folder / "workflows.sqlite")
        self.database.migrate()
        self._prepared = True

    def start(self) -> None:
        """Run workflows and periodic tasks, after `prepare` if it was not called yet. Raises StartError."""
        if not self._prepared:
            self.prepare()
        self.workflows.start()
        for thread in self._threads:
            thread.start()
        self.open = True

    async def write(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call `work` in one of the threads for requests that write to the database, and return its result.

        Writers that wait for the database's lock therefore never block requests that read.
        """
        call = partial(copy_context().run, partial(work, *args, **options))
        return await asyncio.get_running_loop().run_in_executor(self._writers, call)

    def stop(self) -> None:
        """Stop. The next start continues what is unfinished."""
        self.open = False
        self._writers.shutdown(wait=False, cancel_futures=True)
        self._ended.set()
        if self._threads[0].is_alive():
            for thread in self._threads:
                thread.join(STOP_SECONDS)
            self.workflows.stop()
        self.database.close()

    def _repeat(self, periodic_tasks: Sequence[PeriodicTask]) -> None:
        while True:
            for task in periodic_tasks:
                try:
                    task(int(time.time()))
                except ServiceError as error:
                    log.warning("a periodic task is tried again: %s", error.message)
                except Exception:
                    log.exception("a periodic task failed; it is tried again")
            if self._ended.wait(self._period):
                return


def _hourly(task: PeriodicTask) -> PeriodicTask:
    """Return a task that runs once an hour, however often it is called. A failed one runs again at the next call."""
    due = time.monotonic()

    def run(now: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            task(now)
            due = time.monotonic() + 3600

    return run
