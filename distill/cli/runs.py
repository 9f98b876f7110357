"""`distill runs` and `distill report`: run folders, listed and shown."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; report.html in the run folder if not given.", dir_okay=False)
    ] = None,
) -> None:
    """Show a run in one HTML file: its state, curves, samples, evaluations, cost and configuration.

    The file needs nothing beside it. Runs that are going on or were stopped are shown as far as they are.
    """
    from distill.report.html import write_report
    from distill.report.run_folder import read_run

    page = out or run / "report.html"
    write_report(read_run(run), page)
    typer.echo(f"The report is {page}.")


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that the run folders are in.")] = Path("runs"),
) -> None:
    """List runs: progress in images, the best score, alarms, and whether a run is finished."""
    import time

    from rich.markup import escape

    from distill.cli.console import out, table
    from distill.report.html import si
    from distill.report.run_folder import read_runs

    found = read_runs(folder)
    if not found:
        typer.echo(f"There is no run in {folder}; `distill run scenes-debug` makes one in runs.")
        return
    rows = []
    for each in found:
        best = f"{each.best['overall']:.3f}" if "overall" in each.best else "-"
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.changed))
        seen = f"{si(each.images)} / {si(each.budget)}"
        alarms = str(len(each.alarms) or "-")
        rows.append((escape(each.name), escape(str(each.config["teacher"])), seen, best, alarms, changed, each.state))
    out.print(table(str(folder), ("run", "teacher", "images", "score", "alarms", "last change", "state"), rows))
