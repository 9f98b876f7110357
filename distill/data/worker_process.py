"""Worker processes of a pool: they leave Ctrl-C to their parent and end with it. No torch, so that they start fast."""

import os
import signal
from multiprocessing import parent_process
from threading import Thread


def follow_parent() -> None:
    """Ignore Ctrl-C, which reaches all processes, and exit when the parent process ends, also if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
