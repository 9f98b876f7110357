"""The `distill` command: parse, call, print; a file for each noun. No command imports torch before it runs."""

import errno
import os
import sys
from contextlib import suppress

import typer

from distill.cli import caches, cifar10, compare, evaluate, generate, jobs, plan, run, runs, scenes
from distill.errors import ClaimedError, DistillError

with suppress(ModuleNotFoundError):  # the package of toy datasets may be deleted
    from distill import worlds  # noqa: F401  adds their sources of prompts and images

# The libraries' own bars and notices would run through ours.
for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

app = typer.Typer(
    help="Distill a Stable Diffusion 3 type teacher into a one-step student.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(scenes.teacher)
app.command()(run.run)
app.command()(run.export)
app.command()(caches.embed)
app.command()(caches.encode)
app.command()(generate.generate)
app.command()(evaluate.evaluate)
app.command()(evaluate.geneval)
app.command()(evaluate.score)
app.command()(compare.compare)
app.command()(plan.plan)
app.command()(runs.report)
app.command()(runs.runs)
app.command()(jobs.submit)
app.command()(jobs.jobs)
app.command()(jobs.logs)
app.command()(jobs.cancel)

_scenes = typer.Typer(help="The toy dataset of colored shapes that ships with the project.", no_args_is_help=True)
_scenes.command()(scenes.show)
app.add_typer(_scenes, name="scenes")

_prompts = typer.Typer(help="Look at prompts before they are encoded.", no_args_is_help=True)
_prompts.command()(caches.stats)
app.add_typer(_prompts, name="prompts")

_cifar10 = typer.Typer(help="CIFAR-10 in pixels, from its own binary files.", no_args_is_help=True)
_cifar10.command()(cifar10.teacher)
_cifar10.command()(cifar10.images)
app.add_typer(_cifar10, name="cifar10")


def main() -> None:
    """Entry point of the console command: errors that a user can correct end it with one sentence and status 2.

    These are this package's errors, system errors about files or memory, and invalid Unicode text. Status 75 means:
    try again later.
    """
    try:
        app()
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if isinstance(error, ClaimedError) else 2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "make room and give the same command again, it continues" if full else "give another file or folder"
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"error: {what}; {mend}", file=sys.stderr)
        sys.exit(2)
    except UnicodeEncodeError as error:
        part = error.object[error.start : error.start + 1]
        print(f"error: {part!a} is half of a character, which cannot be written; remove it", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _of_memory(error):
            raise
        why = str(error).partition("\n")[0]
        print(f"error: there is not enough memory ({why}); lower the batch or micro_batch", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _of_memory(error: Exception) -> bool:
    """Whether this is an out-of-memory error of Python, or of PyTorch on a GPU or CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
