"""Checks of SQLite files before a server uses them."""

import contextlib
import sqlite3
from pathlib import Path

from service.errors import StartError


def check_sqlite(path: Path) -> None:
    """Raises StartError for a file that is damaged, no database, or not writable. One that is missing is in order."""
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA user_version = {version}")  # writes, where the file can be written
            connection.execute("ROLLBACK")
            found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        reason = " ".join(found.split())
        raise StartError(
            f"the database {path} cannot be used ({reason}); make it and its folder writable for the user that the "
            "server runs as, or restore the data folder from a backup"
        )
