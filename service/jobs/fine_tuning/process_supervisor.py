"""Runs a command that must not outlive the server.

`python -m service.jobs.fine_tuning.process_supervisor SECONDS PROCESSES COMMAND...` runs the command in PROCESSES
processes, which find each other by the environment variables that accelerate and torch read.
What the first prints is shown; of the others only what one printed that ended them all. When one has ended badly the
others may wait for it for ever, so they are killed a little later.

The server holds the other end of standard input. When that closes, because the server lets go or has died in whatever
way, the command and all that it started are asked to stop by SIGTERM, and killed SECONDS later. This process leads
their process group, so that killing the group leaves nothing behind. It exits with the command's status, 128 + N for
one that died of signal N.
"""

import contextlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

ALONE_SECONDS = 5.0  # that the other processes get to end by themselves when one has ended badly
LOST = 1  # the status of a process that an exception ended, as one does whose fellow has gone


def main() -> int:
    """Run the command to its end."""
    seconds, number, command = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)  # meant for the command, which gets them too; not ignored: it inherits
    printed = [None, *(tempfile.TemporaryFile() for _ in range(number - 1))]  # noqa: SIM115, open to the end
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        for environment, output in zip(_environments(number), printed, strict=True)
    ]
    threading.Thread(target=_watch, args=(seconds,), daemon=True).start()
    telling = _telling(processes)
    if output := printed[telling]:
        output.seek(0)
        shutil.copyfileobj(output, sys.stdout.buffer)
    status = processes[telling].returncode
    return 128 - status if status < 0 else status


def _environments(number: int) -> list[dict[str, str]]:
    """This process's environment for each of so many; one alone needs nothing more."""
    if number == 1:
        return [dict(os.environ)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    shared = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // number)), **os.environ}
    return [
        {**shared, **{name: str(value) for name, value in world.items()}, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(number)
    ]


def _telling(processes: list[subprocess.Popen[bytes]]) -> int:
    """The rank of the process that tells how all ended, when they have: of one that ended badly by itself, if any did.

    One that says why comes before one that lost its fellows.
    """
    statuses: queue.SimpleQueue[int] = queue.SimpleQueue()
    for process in processes:
        threading.Thread(target=lambda ended=process: statuses.put(ended.wait()), daemon=True).start()
    bad = False
    with contextlib.suppress(queue.Empty):
        for _ in processes:
            bad = statuses.get(timeout=ALONE_SECONDS if bad else None) != 0 or bad
    ended = [rank for rank, process in enumerate(processes) if process.poll()]
    for process in processes:
        process.kill()
        process.wait()
    return min(ended, key=lambda rank: processes[rank].returncode == LOST, default=0)


def _watch(seconds: float) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(seconds)  # this process is gone when its command is
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
