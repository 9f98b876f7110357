"""`distill runs` and `distill report`: list run folders, and show one as a page."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option(help="HTML file. Default: the run's report.html.", dir_okay=False)] = None,
) -> None:
    """Write a report of a run: one HTML file with its state, curves, samples, evaluations, cost and configuration.

    The file is self-contained. Running and stopped runs have a report too.
    """
    from distill.report.html import write_report
    from distill.report.run_folder import read_run

    page = out or run / "report.html"
    write_report(read_run(run), page)
    typer.echo(f"The report is {page}.")


def runs(folder: Annotated[Path, typer.Argument(help="Folder that contains the run folders.")] = Path("runs")) -> None:
    """List runs: images / budget, a metric of the best student, alarms, and state."""
    import time

    from rich.markup import escape

    from distill.cli.console import out, table
    from distill.report.run_folder import read_runs
    from distill.report.units import si

    found = read_runs(folder)
    if not found:
        typer.echo(f"There is no run in {folder}. `distill run scenes-debug` creates one in the folder runs.")
        return
    rows = []
    for each in found:
        name = next((name for name in ("overall", "kernel", "clip_score", "psnr") if name in each.best), None)
        best = "-" if name is None else f"{name} {each.best[name]:.3g}"
        changed = "-" if each.changed is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(each.changed))
        seen = f"{si(each.images)} / {si(each.budget)}"
        alarms = str(len(each.alarms) or "-")
        rows.append((escape(each.name), escape(str(each.config["teacher"])), seen, best, alarms, changed, each.state))
    out.print(table(str(folder), ("run", "teacher", "images", "best", "alarms", "last change", "state"), rows))
