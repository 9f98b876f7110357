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


def programs() -> Path | None:
    """Where `initdb` and `postgres` are, the newest version first; None where they are not."""
    found = shutil.which("initdb")
    debian = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda path: int(path.split("/")[4]))
    paths = [Path(path) for path in [found, *reversed(debian)] if path]
    return paths[0].parent if paths else None


@contextlib.contextmanager
def running(binaries: Path) -> Iterator[str]:
    """A server of its own on a free port of the loopback; yields its URL. It refuses to be root, so root steps down."""
    user = next((each for each in ("postgres", "nobody") if os.geteuid() == 0 and _exists(each)), None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        if user:
            shutil.chown(folder, user)
        data = f"{folder}/data"
        quick = {"user": user, "cwd": folder, "check": True, "capture_output": True}
        subprocess.run([binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"], **quick)
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        control = [binaries / "pg_ctl", "-D", data, "-w"]
        with open(os.devnull, "wb") as nowhere:  # the server keeps what it is given, and a pipe would be held open
            start = [*control, "-o", settings, "-l", f"{folder}/log", "start"]
            subprocess.run(start, user=user, cwd=folder, check=True, stdout=nowhere, stderr=nowhere)
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quick)


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
