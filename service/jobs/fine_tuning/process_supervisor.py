"""Runs a command that must not outlive the server.

`python -m service.jobs.fine_tuning.process_supervisor SECONDS PROCESSES COMMAND...` runs the command in PROCESSES
processes, which find each other by the environment variables that accelerate and torch read.
The output of the first process is shown, and that of another one only if it caused the end. If a process fails, the
others may wait for it without end, so they are killed shortly after.

The server holds the other end of standard input. If it closes that or dies, the command and its children get SIGTERM,
and SIGKILL after SECONDS. This process leads their process group, so that a kill of the group ends them all. It exits
with the status of the command, which is 128 + N if signal N ended it.
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

REST_SECONDS = 5.0  # in which the other processes may exit by themselves if one has failed
LOST = 1  # the status after an exception, which is also what a process raises that has lost another one


def main() -> int:
    seconds, number, command = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)  # the command gets them too; not SIG_IGN, which it would inherit
    printed = [None, *(tempfile.TemporaryFile() for _ in range(number - 1))]  # noqa: SIM115, open to the end
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        for environment, output in zip(_environments(number), printed, strict=True)
    ]
    threading.Thread(target=_watch, args=(seconds,), daemon=True).start()
    decisive = _decisive(processes)
    if output := printed[decisive]:
        output.seek(0)
        shutil.copyfileobj(output, sys.stdout.buffer)
    status = processes[decisive].returncode
    return 128 - status if status < 0 else status


def _environments(number: int) -> list[dict[str, str]]:
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


def _decisive(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait until all have exited. Returns the rank of the process whose status counts: one that failed, if any did.

    A process that reports an error comes before one that only lost the others.
    """
    statuses: queue.SimpleQueue[int] = queue.SimpleQueue()
    for process in processes:
        threading.Thread(target=lambda exited=process: statuses.put(exited.wait()), daemon=True).start()
    failed = False
    with contextlib.suppress(queue.Empty):
        for _ in processes:
            failed = statuses.get(timeout=REST_SECONDS if failed else None) != 0 or failed
    failures = [rank for rank, process in enumerate(processes) if process.poll()]
    for process in processes:
        process.kill()
        process.wait()
    return min(failures, key=lambda rank: processes[rank].returncode == LOST, default=0)


def _watch(seconds: float) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(seconds)  # this process has exited by then if its command has
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
