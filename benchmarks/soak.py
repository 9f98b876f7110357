"""Kill a distillation at random moments, resume it each time, and compare its weights with an uninterrupted run's.

python benchmarks/soak.py [--kills 20] [--config scenes-debug] [--set key=value ...] [--out runs/soak] [--seed 0]

Both runs take the same command. Every other kill (SIGKILL, so nothing can be tidied up) comes while the run starts, at
a random time up to what the undisturbed one took for that; the others come at a random time after its next checkpoint,
up to what the undisturbed one took from its first to its end. What it had kept by then is named by the newest
checkpoint. Ends with status 1 when one number of the last checkpoint differs.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from distill.training import checkpoint

DEBUG = ("images=320", "cadence.checkpoint=16", "cadence.evaluate=100000", "cadence.sample=100000")


def main() -> None:
    """Run both, compare them and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--config", default="scenes-debug", help="preset or YAML file")
    parser.add_argument("--set", action="append", dest="overrides", help=f"default: {' '.join(DEBUG)}")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    for name in ("undisturbed", "killed"):  # of an earlier soak
        shutil.rmtree(arguments.out / name, ignore_errors=True)

    def command(name: str) -> list[str]:
        sets = [part for value in arguments.overrides or DEBUG for part in ("--set", value)]
        run = [sys.executable, "-m", "distill.cli", "run", arguments.config, *sets]
        return [*run, "--out", str(arguments.out / name)]

    started = time.monotonic()
    process = _start(command("undisturbed"))
    _saved(process, arguments.out / "undisturbed")
    starting = time.monotonic() - started
    _end(process)
    training = time.monotonic() - started - starting
    print(f"undisturbed: {starting:.0f} s to the first checkpoint, {training:.0f} s from there", flush=True)

    moments = random.Random(arguments.seed)
    kills = 0
    while kills < arguments.kills:
        process = _start(command("killed"))
        if kills % 2:
            _saved(process, arguments.out / "killed")
        try:
            process.wait(moments.uniform(0, training if kills % 2 else starting))
            _end(process)
            # It came to its end first: begin another, so that as many kills as asked for happen.
            _compare(arguments.out)
            shutil.rmtree(arguments.out / "killed")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            newest = checkpoint.latest(arguments.out / "killed" / "checkpoints")
            print(f"kill {kills}: after {int(newest.name) if newest else 0} saved images", flush=True)
    _end(_start(command("killed")))
    _compare(arguments.out)
    print(f"{kills} kills, the same bits")


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _saved(process: subprocess.Popen[str], run: Path) -> None:
    """Wait until a run has one more checkpoint, or ends."""
    before = checkpoint.latest(run / "checkpoints")
    while process.poll() is None and checkpoint.latest(run / "checkpoints") == before:
        time.sleep(0.05)


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for a run's end; exit with its output if it failed."""
    said = process.communicate()[1]
    if process.returncode:
        sys.exit(f"status {process.returncode}: {said.strip()}")


def _compare(out: Path) -> None:
    """End with status 1 unless both runs' last states are equal to the bit."""
    states = []
    for name in ("undisturbed", "killed"):
        newest = checkpoint.latest(out / name / "checkpoints")
        if newest is None:
            sys.exit(f"{out / name} has no checkpoint; give more images than cadence.checkpoint")
        states.append((newest.name, checkpoint.load(newest)[0]))
    (images, expected), (other, found) = states
    differing = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    if images != other or expected.keys() != found.keys() or differing:
        sys.exit(f"the killed run's weights differ, at {other} images of {images}: {', '.join(differing[:5])}")


if __name__ == "__main__":
    main()
