"""Signals that end a command."""

import os
import signal
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """End this process as the signal does by default. For process 1 of a container the default is to go on."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)


def handled() -> list[signal.Signals]:
    """The signals that end a command: SIGHUP is not among them where nohup has it ignored."""
    return [each for each in ENDING if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this process, also process 1. Python itself handles SIGINT."""
    for each in handled():
        if each != signal.SIGINT:
            signal.signal(each, end_at_once)
