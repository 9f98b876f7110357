"""Signals that end a command."""

import os
import signal
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """End this process by the signal's default action. Process 1 of a container has none, so it exits."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)


def handled() -> list[signal.Signals]:
    """The signals that end a command; without SIGHUP if nohup made the process ignore it."""
    return [each for each in ENDING if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process, also as process 1. Python itself handles SIGINT."""
    for each in handled():
        if each != signal.SIGINT:
            signal.signal(each, end_at_once)
