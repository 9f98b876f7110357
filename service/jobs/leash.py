"""Runs a command that must not outlive the server: `python -m service.jobs.leash SECONDS COMMAND...`.

The server holds the other end of standard input. When that closes, because the server lets go or has died in whatever
way, the command and all that it started are asked to stop by SIGTERM, and killed SECONDS later. This process leads
their process group, so that killing the group leaves nothing behind. It exits with the command's status, 128 + N for
one that died of signal N.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Run the command to its end."""
    seconds, command = float(sys.argv[1]), sys.argv[2:]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # meant for the command, which gets them too; not ignored: it inherits
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_watch, args=(process, seconds), daemon=True).start()
    status = process.wait()
    return 128 - status if status < 0 else status


def _watch(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.killpg(0, signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
