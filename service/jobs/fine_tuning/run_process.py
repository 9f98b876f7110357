"""`RunProcess`: a command of `distill` in its own process group, under the process supervisor."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SUPERVISOR = "service.jobs.fine_tuning.process_supervisor"
GRACE_SECONDS = 300  # in which a run can write its checkpoint


class RunProcess:
    """A process of a job, seen through its supervisor."""

    def __init__(self, supervisor: subprocess.Popen[bytes]) -> None:
        self._supervisor = supervisor

    @property
    def pid(self) -> int:
        """The id of the supervisor, and of the group of all processes that it started."""
        return self._supervisor.pid

    def status(self) -> int | None:
        """Return None while it runs, then its exit status, which is 128 + N if signal N ended it."""
        status = self._supervisor.poll()
        if status is None or status >= 0:
            return status
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # the command outlives a supervisor that was killed
        return 128 - status

    def stop(self) -> int:
        """Ask the command to stop, wait until it has written its checkpoint and exited, and return its status."""
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()
        self._supervisor.wait()
        status = self.status()
        assert status is not None
        return status


@contextmanager
def run_process(
    command: Sequence[str], environment: dict[str, str], nice: int, console: Path, processes: int = 1
) -> Iterator[RunProcess]:
    """Run a command while the block lasts, and stop it at the end. Its output is appended to `console`.

    Several `processes` of the same command share one run, as under `accelerate launch`.
    """
    supervisor = [sys.executable, "-m", SUPERVISOR, str(GRACE_SECONDS), str(processes)]
    with console.open("ab") as output:
        process = RunProcess(
            subprocess.Popen(
                ["nice", "-n", str(nice), *supervisor, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        )
    try:
        yield process
    finally:
        process.stop()


def environment(devices: Sequence[str]) -> dict[str, str]:
    """Return this process's environment with only the devices of jobs visible.

    GPU numbers are those of this process, which may itself see only some of the machine's.
    """
    numbers = [device.removeprefix("cuda:") for device in devices if device != "cpu"]
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    if own is not None:
        visible = own.split(",")
        numbers = [visible[int(number)] for number in numbers]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SERVICE_")}  # holds secrets
    own_choice = {"CUDA_VISIBLE_DEVICES": ",".join(numbers), "ACCELERATE_USE_CPU": str(not numbers)}
    return {**inherited, **own_choice, "HF_HUB_OFFLINE": "1"}
