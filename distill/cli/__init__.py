"""The `distill` command line. Each command parses, calls and prints. torch is imported only when a command runs."""

import errno
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise

import typer

from distill.cli import (
    caches,
    cifar10,
    compare,
    decoder,
    evaluate,
    fetch,
    generate,
    geneval,
    jobs,
    plan,
    run,
    runs,
    scenes,
    score,
)
from distill.cli.options import Version
from distill.errors import ClaimedError, ConfigError, DistillError

if find_spec("distill.worlds") is not None:  # the folder of toy datasets may be deleted
    from distill import worlds  # noqa: F401  registers their sources

# The libraries' progress bars and messages would interrupt ours.
for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def _common(version: Version = False) -> None:
    """Distill a Stable Diffusion 3 teacher into a one-step student."""


app.command()(scenes.teacher)
app.command()(fetch.fetch)
app.command()(run.run)
app.command()(run.export)
app.command()(caches.embed)
app.command()(caches.encode)
app.command()(decoder.decoder)
app.command()(generate.generate)
app.command()(evaluate.evaluate)
app.command()(geneval.geneval)
app.command()(score.score)
app.command()(compare.compare)
app.command()(plan.plan)
app.command()(runs.report)
app.command()(runs.runs)
app.command()(jobs.submit)
app.command()(jobs.jobs)
app.command()(jobs.logs)
app.command()(jobs.cancel)

_scenes = typer.Typer(help="The toy dataset that ships with the project.", no_args_is_help=True)
_scenes.command()(scenes.show)
app.add_typer(_scenes, name="scenes")

_prompts = typer.Typer(help="Inspect prompts before they are encoded.", no_args_is_help=True)
_prompts.command()(caches.stats)
app.add_typer(_prompts, name="prompts")

_cifar10 = typer.Typer(help="CIFAR-10 in pixel space, from its binary files.", no_args_is_help=True)
_cifar10.command()(cifar10.teacher)
_cifar10.command()(cifar10.images)
app.add_typer(_cifar10, name="cifar10")


def main(words: Sequence[str] | None = None) -> None:
    """Run the command of `words`, by default those of the process, and exit with its status.

    Errors that a user can fix print one sentence and exit with status 2: the errors of this package, system errors of
    files or memory, and invalid Unicode text. Status 75 means that the command can be tried again later.
    """
    try:
        _check_out(sys.argv[1:] if words is None else words)
        app(words)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if isinstance(error, ClaimedError) else 2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free disk space and run the same command again to resume" if full else "give another file or folder"
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        print(f"error: {what}; {fix}", file=sys.stderr)
        sys.exit(2)
    except UnicodeEncodeError as error:
        part = error.object[error.start : error.start + 1]
        print(f"error: {part!a} is an incomplete Unicode character; remove it", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _of_memory(error):
            raise
        why = str(error).partition("\n")[0]
        print(f"error: there is not enough memory ({why}); lower the batch or micro_batch", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _check_out(words: Sequence[str]) -> None:
    """Raise ConfigError for an empty --out, as of an unset variable; a path reads it as the current folder."""
    if "--out=" in words or ("--out", "") in pairwise(words):
        raise ConfigError("--out is empty; name a folder or file, and check the variables of the shell")


def _of_memory(error: Exception) -> bool:
    """Return whether this is an out-of-memory error of Python, or of PyTorch on a GPU or CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
