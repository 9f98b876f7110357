"""Ctrl-C and SIGTERM end a training at the end of a step, which is saved."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from distill.training.state import Progress


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


def agreed(asked: list[int], machine: "Accelerator") -> list[int]:
    """The signal that any process of a run received, the same in all of them. All call this after each round."""
    if machine.num_processes == 1:
        return asked
    import torch

    number = torch.tensor(max(asked, default=0), device=machine.device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return [found] if (found := int(number)) else []


def stopped(images: int, asked: list[int]) -> typer.Exit:
    """Say so, and with which status the command ends."""
    from distill.cli.console import out

    out.print(f"Stopped after {images} images, which are saved; the same command continues.", highlight=False)
    return typer.Exit(128 + asked[0])


def train_with_bar(name: str, images: int, training: "Iterable[Progress]") -> None:
    """Train a teacher to its end, with a bar. Ends the command when asked to stop."""
    from distill.cli.console import image_bar

    with image_bar(name, images) as bar, asked_to_stop() as asked:
        for progress in training:
            bar.update(progress.images, progress.metrics)
            if asked:
                progress.save()
                raise stopped(progress.images, asked)
