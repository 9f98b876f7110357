"""Ctrl-C and SIGTERM stop a training after the current step, whose state is saved."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from distill.training.state import TrainingProgress


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Record the first Ctrl-C or SIGTERM, so that the step can end and be saved; the second one stops at once."""
    signals: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def record(number: int, _: object) -> None:
        signals.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, record)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agreed(signals: list[int], machine: "Accelerator") -> list[int]:
    """Return the signal that any process of the run received. All processes call this after each round."""
    if machine.num_processes == 1:
        return signals
    import torch

    number = torch.tensor(max(signals, default=0), device=machine.device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return [found] if (found := int(number)) else []


def stopped(images: int, signals: list[int]) -> typer.Exit:
    """Print that training stopped, and return the exit status."""
    from distill.cli.console import out

    out.print(f"Stopped after {images} images, which are saved. Run the same command again to resume.", highlight=False)
    return typer.Exit(128 + signals[0])


def stopped_between_files(signals: list[int]) -> typer.Exit:
    """Print that a cache is not complete, and return the exit status."""
    typer.echo("Stopped. Complete files are kept. Run the same command again to resume.")
    return typer.Exit(128 + signals[0])


def train_with_bar(name: str, images: int, training: "Iterable[TrainingProgress]") -> None:
    """Train a teacher with a progress bar. Exit the command after a stop signal."""
    from distill.cli.console import image_bar

    with image_bar(name, images) as bar, stop_signals() as signals:
        for progress in training:
            bar.update(progress.images, progress.metrics)
            for note in progress.notes:
                bar.print(note)
            if signals:
                progress.save()
                raise stopped(progress.images, signals)
