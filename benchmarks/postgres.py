"""A real PostgreSQL in a temporary folder, where its programs are installed."""

import contextlib
import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg


class Postgres:
    """A PostgreSQL server on a free port of the loopback. It does not run as root, so root switches to another user."""

    def __init__(self, binaries: Path, folder: str) -> None:
        self._user = next((each for each in ("postgres", "nobody") if os.geteuid() == 0 and _exists(each)), None)
        self._binaries, self._folder = binaries, folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self._port}/postgres"
        if self._user:
            shutil.chown(folder, self._user)
        self._run("initdb", "-D", f"{folder}/data", "-U", "postgres", "-A", "trust", "--no-sync")

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        settings = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self._run("pg_ctl", "-D", f"{self._folder}/data", "-w", "-o", settings, "-l", f"{self._folder}/log", "start")

    def stop(self) -> None:
        """Stop immediately, as in a crash: uncommitted data and all connections are lost."""
        self._run("pg_ctl", "-D", f"{self._folder}/data", "-w", "-m", "immediate", "stop")

    def kill(self) -> None:
        """Kill all of its processes by SIGKILL."""
        processes = self._processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # they leave when the first is gone
                process.kill()
        psutil.wait_procs(processes)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Stop all of its processes by SIGSTOP for the block: connections stay open without an answer."""
        processes = self._processes()
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Make the database read-only: connections are closed, and those that are opened in the block cannot write."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
            connection.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE datname = 'postgres' AND pid <> pg_backend_pid()"
            )
            try:
                yield
            finally:
                connection.execute("ALTER DATABASE postgres RESET default_transaction_read_only")

    def _processes(self) -> list[psutil.Process]:
        server = psutil.Process(int(Path(self._folder, "data", "postmaster.pid").read_text().split()[0]))
        return [server, *server.children(recursive=True)]

    def _run(self, program: str, *words: str) -> None:
        # Into nowhere: the server keeps what it is given, and a pipe would be held open.
        quiet = {"cwd": self._folder, "check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([self._binaries / program, *words], user=self._user, **quiet)


def programs() -> Path | None:
    """Find the folder of `initdb` and `postgres`, of the newest version; None if they are not installed."""
    found = shutil.which("initdb")
    debian = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda path: int(path.split("/")[4]))
    paths = [Path(path) for path in [found, *reversed(debian)] if path]
    return paths[0].parent if paths else None


@contextlib.contextmanager
def running(binaries: Path) -> Iterator[Postgres]:
    """Run a server for the duration of the block; it must still run at the end."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        server = Postgres(binaries, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
