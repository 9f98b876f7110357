"""Signals that end a command or a server."""

import os
import signal
from types import FrameType

from service.temporary_folders import remove_folders

EXIT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def exit_at_once(number: int, frame: FrameType | None = None) -> None:
    """Remove temporary folders, then run the signal's default action, which ends this process.

    Process 1 of a container has no default action, so it exits.
    """
    remove_folders()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)


def handled_signals() -> list[signal.Signals]:
    """Return the signals that end this process, without SIGHUP if nohup made it ignored."""
    return [each for each in EXIT_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def exit_on_signals() -> None:
    """Exit at SIGTERM and SIGHUP, also as process 1. Python itself handles SIGINT."""
    for each in handled_signals():
        if each != signal.SIGINT:
            signal.signal(each, exit_at_once)
