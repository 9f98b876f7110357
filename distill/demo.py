"""`make demo`: the whole path in one go, each step left alone when it is done already."""

import argparse
import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

ADDRESS = "http://127.0.0.1:8000"
PROMPT = "a photo of a red circle to the left of a blue square"


def main() -> int:
    """Distil for a short budget, judge, serve, ask once; serve on until Ctrl-C unless --exit."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--exit", action="store_true", help="end instead of serving on")
    arguments = parser.parse_args()
    out: Path = arguments.out

    # The same command continues a stopped run and does nothing for a finished one.
    _distill("run", "demo", "--out", str(out))
    picture, figures = out / "teacher-vs-student.png", out / "evaluation.txt"
    if not (picture.exists() and figures.exists()):
        command = ("evaluate", "--student", str(out / "student"), "--per-task", "16", "--picture", str(picture))
        aside = figures.with_suffix(".partial")
        with aside.open("w") as file:
            _distill(*command, stdout=file)
        aside.replace(figures)
    print(figures.read_text())

    server = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "serve", "--model", str(out / "student")],
        env=os.environ | {"SERVICE_LOG_FORMAT": "text", "SERVICE_LOG_LEVEL": "warning"},  # what follows is to be seen
    )
    try:
        _wait_until_ready(server)
        image = out / "first-image.png"
        image.write_bytes(_ask(PROMPT))
        print(f"Teacher against student: {picture}; the image that the server just made of {PROMPT!r}: {image}")
        print(f"The server answers on {ADDRESS}, where a page draws as you type; docs/service.md tells of its API")
        print(f"""Next: curl {ADDRESS}/v1/images/generations --json '{{"prompt": "two green stars", "seed": 1}}'""")
        sys.stdout.flush()
        if not arguments.exit:
            server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    return 0


def _distill(*arguments: str, stdout: IO[str] | None = None) -> None:
    done = subprocess.run([sys.executable, "-m", "distill.cli", *arguments], stdout=stdout)
    if done.returncode:
        sys.exit(done.returncode)


def _wait_until_ready(server: "subprocess.Popen[bytes]") -> None:
    while True:
        if server.poll() is not None:
            sys.exit(f"the server ended with status {server.returncode}; is port 8000 taken?")
        try:
            urllib.request.urlopen(f"{ADDRESS}/readyz", timeout=2).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return


def _ask(prompt: str) -> bytes:
    body = json.dumps({"prompt": prompt, "size": "auto", "seed": 1}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{ADDRESS}/v1/images/generations", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return base64.b64decode(json.load(answer)["data"][0]["b64_json"])


if __name__ == "__main__":
    sys.exit(main())
