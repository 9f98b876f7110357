"""Ctrl-C and SIGTERM end a training at the end of a step, which is saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM is noted, so that a step can end and be saved; the second ends at once."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(images: int, asked: list[int]) -> typer.Exit:
    """Say so, and with which status the command ends."""
    typer.echo(f"Stopped after {images} images, which are saved; the same command continues.")
    return typer.Exit(128 + asked[0])
