"""`Jobs`: what the server keeps over a restart, and the threads that look after it."""

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
from service.files import PRIVATE, aside, make_writable
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
PeriodicTask = Callable[[int], None]  # of the time in seconds
SECRET_BYTES = 32  # of the secret that signs links
WRITERS = 8  # requests that write to the database at once
STOP_SECONDS = 10  # that a thread which waits for the database gets at the end; it is left behind then


class Jobs:
    """The database, files, workflows, and the chores that are done every few seconds.

    Every method but `write` blocks.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Makes the data folder. Raises StartError if it cannot be made or written."""
        self.folder = folder.absolute()
        for needed in (self.folder, self.folder / "files"):
            try:
                make_writable(needed)
            except OSError as error:
                raise StartError(
                    f"data: the folder {needed} cannot be made or written ({error.strerror}); make it writable for the "
                    "user that the server runs as, or name another one with --data, or `none` to serve without files, "
                    "batches and jobs"
                ) from None
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
        ]  # each must be harmless to repeat, and to do in several servers at once
        self._period = settings.jobs.takeover_seconds / LOOKS
        self._ended = threading.Event()
        # The pulse has a thread of its own: a chore may wait for long, and nobody is to think the server dead.
        beat = [lambda now: self.workflows.beat()]
        self._threads = [
            threading.Thread(target=self._repeat, args=(periodic_tasks,), name=f"jobs-{name}", daemon=True)
            for name, periodic_tasks in (("pulse", beat), ("keeper", self.periodic_tasks))
        ]
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="jobs-write")
        self._open = False

    @property
    def open(self) -> bool:
        """Whether requests are taken."""
        return self._open

    def secret(self) -> bytes:
        """Random bytes that are drawn once and kept, so that signed links outlast the server.

        Raises StartError for an empty or damaged file, because anyone could sign with its contents.
        """
        path = self.folder / "secret"
        try:
            with FileLock(f"{path}.lock"):  # another server may start at the same time
                if not path.exists():
                    with aside(path, PRIVATE) as file:
                        file.write(secrets.token_bytes(SECRET_BYTES))
            secret = path.read_bytes()
        except OSError as error:
            raise StartError(
                f"{path}, which signs links to images, cannot be read or made ({error.strerror}); give it and "
                f"{path.name}.lock to the user that the server runs as"
            ) from None
        if len(secret) < SECRET_BYTES or not any(secret):
            raise StartError(
                f"{path}, which signs links to images, is damaged; restore it from a backup, or delete it: the server "
                "then draws a new secret, and links given before are no longer valid"
            )
        return secret

    def check(self) -> None:
        """Check the databases and bring them up to date. Raises StartError if they cannot be used."""
        if self.database.is_sqlite:
            check_sqlite(Path(self.database.url.database or ""))
            check_sqlite(self.folder / "workflows.sqlite")
        self.database.migrate()

    def start(self) -> None:
        """Bring the database up to date and run workflows. Raises StartError."""
        self.database.migrate()
        self.workflows.start()
        for thread in self._threads:
            thread.start()
        self._open = True

    async def write(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call `work` in one of the threads for requests that write to the database, and return its result.

        Writers that wait for the database's lock therefore never block requests that read.
        """
        call = partial(copy_context().run, partial(work, *args, **options))
        return await asyncio.get_running_loop().run_in_executor(self._writers, call)

    def stop(self) -> None:
        """Leave what is unfinished to the next start."""
        self._open = False
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
                    log.warning("put off: %s", error.message)
                except Exception:
                    log.exception("a chore failed; it is tried again")
            if self._ended.wait(self._period):
                return
