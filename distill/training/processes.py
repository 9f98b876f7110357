"""The processes of a run: waiting for the main one, and taking values from it."""

import time
from datetime import timedelta
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # after which a collective operation fails, because a process has died
_FIRST, _LONGEST = 0.001, 1.0  # seconds between two looks at the store, each pause twice the one before
_Value = TypeVar("_Value")


def wait_for_main(machine: Accelerator) -> None:
    """A barrier that the main process may reach late, after work that only it does; all processes call this.

    The others look at the store through which the processes found each other. So encoding, evaluation and checkpoints
    may take any time, while a collective operation has a timeout of minutes. Raises RuntimeError if the store cannot be
    reached, because its host is gone.
    """
    if machine.num_processes == 1:
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    number = store.add(f"distill/calls/{machine.process_index}", 1)
    done = f"distill/done/{number}"
    if machine.is_main_process:
        store.set(done, "")
    pause = _FIRST
    while not store.check([done]):
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
    machine.wait_for_everyone()
    if machine.is_main_process:
        store.delete_key(done)


def from_main(value: _Value) -> _Value:
    """Return the main process's value in every process; all processes call this."""
    (found,) = broadcast_object_list([value])
    return cast(_Value, found)
