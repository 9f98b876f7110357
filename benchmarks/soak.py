"""Kill a distillation at random moments, let it go on each time, and compare its weights with an undisturbed run's.

python benchmarks/soak.py [--kills 20] [--config scenes-debug] [--set key=value ...] [--out runs/soak] [--seed 0]

Both runs take the same command. Before each kill (SIGKILL, so nothing can be tidied up) the run gets a random time,
up to what the undisturbed one took; what it was doing then is named by the newest checkpoint. Ends with status 1 when
one number of the last checkpoint differs.
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

from distill import checkpoint

DEBUG = ("images=320", "cadence.checkpoint=16", "cadence.evaluate=100000", "cadence.sample=100000")


def main() -> None:
    """Run both, compare, say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--config", default="scenes-debug", help="preset or YAML file")
    parser.add_argument("--set", action="append", dest="overrides", help=f"default: {' '.join(DEBUG)}")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)

    def command(name: str) -> list[str]:
        sets = [part for value in arguments.overrides or DEBUG for part in ("--set", value)]
        run = [sys.executable, "-m", "distill.cli", "run", arguments.config, *sets]
        return [*run, "--out", str(arguments.out / name)]

    started = time.monotonic()
    _run(command("undisturbed"))
    whole = time.monotonic() - started
    print(f"undisturbed: {whole:.0f} s", flush=True)

    moments = random.Random(arguments.seed)
    kills = 0
    while kills < arguments.kills:
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if process.wait(moments.uniform(0, whole)):
                sys.exit(f"the run ended with status {process.returncode}; see its error with: {command('killed')}")
            # It came to its end first: begin another, so that as many kills as asked for happen.
            _compare(arguments.out)
            shutil.rmtree(arguments.out / "killed")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            newest = checkpoint.latest(arguments.out / "killed" / "checkpoints")
            print(f"kill {kills}: after {int(newest.name) if newest else 0} saved images", flush=True)
    _run(command("killed"))
    _compare(arguments.out)
    print(f"{kills} kills, the same bits")


def _run(command: list[str]) -> None:
    """To the end, or end with what it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"status {done.returncode}: {done.stderr.strip()}")


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
