"""`distill submit`, `jobs`, `logs` and `cancel`: distillation jobs of a server."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.cli.options import Seconds

if TYPE_CHECKING:
    from distill.cli.remote import JobsClient

Url = Annotated[str, typer.Option(envvar="DISTILL_URL", help="URL of the server.")]
Key = Annotated[
    str | None, typer.Option(envvar="DISTILL_KEY", help="API key with the scope jobs, if the server requires keys.")
]
LOOPBACK = "http://127.0.0.1:8000"


def submit(
    prompts: Annotated[Path, typer.Argument(help="Prompts: a txt, json, jsonl, csv, tsv or parquet file.")],
    teacher: Annotated[str, typer.Option(help="Name of the teacher on the server.")] = "scenes",
    preset: Annotated[str | None, typer.Option(help="Preset. Default for the teacher scenes: scenes.")] = None,
    method: Annotated[str | None, typer.Option(help="Method that replaces the preset's: fgm, dmd, ...")] = None,
    images: Annotated[int | None, typer.Option(help="Budget in training images. Default: the preset's.", min=1)] = None,
    seconds: Seconds = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="name=value of the job's distillation object, such as batch=64.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the student's name, ft:TEACHER:SUFFIX:ID.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run. Default: random.", min=0)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show progress until the job ends.")] = False,
    url: Url = LOOPBACK,
    key: Key = None,
) -> None:
    """Create a job on a server, which distills one of its teachers and then serves the student."""
    from distill.cli.remote import JobsClient
    from distill.config import parse_override
    from distill.errors import ConfigError

    given: dict[str, Any] = {"preset": preset, "method": method, "images": images, "seconds": seconds}
    for override in overrides or []:
        name, value = parse_override(override)
        try:
            given[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise ConfigError(f"--set {override}: the value is neither text nor a finite number") from None
    distillation = {name: value for name, value in given.items() if value is not None}
    with JobsClient(url, key) as client:
        fields = {"model": teacher, "suffix": suffix, "seed": seed, "distillation": distillation}
        job = client.submit(prompts, fields)
        typer.echo(f"{job['id']} is {job['status']}; `distill logs {job['id']}` shows its progress.")
        if follow:
            _follow(client, job["id"])


def jobs(
    limit: Annotated[int, typer.Option(help="Maximum number of jobs, newest first.", min=1, max=100)] = 20,
    url: Url = LOOPBACK,
    key: Key = None,
) -> None:
    """List the distillation jobs of a server: id, status, images / budget, creation time, teacher, student."""
    import time

    from distill.cli.remote import JobsClient
    from distill.report.units import si

    with JobsClient(url, key) as client:
        found = client.jobs(limit)
    if not found:
        typer.echo(f"There are no jobs on {url}; `distill submit prompts.txt` creates one.")
    for job in found:
        seen = f"{si(job['images_seen'])} / {si(job['images_total'])}" if job["images_total"] else "-"
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created_at"]))
        cells = (job["id"], job["status"], seen, created, job["model"], job["fine_tuned_model"] or "-")
        typer.echo("\t".join(cells))


def logs(
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    follow: Annotated[bool, typer.Option("--follow", help="Show progress until the job ends.")] = False,
    url: Url = LOOPBACK,
    key: Key = None,
) -> None:
    """Print the events of a job: progress, metrics, alarms."""
    from distill.cli.remote import JobsClient

    with JobsClient(url, key) as client:
        if follow:
            _follow(client, job)
            return
        for event in client.events(job):
            typer.echo(_line(event))


def cancel(job: Annotated[str, typer.Argument(help="Id of the job.")], url: Url = LOOPBACK, key: Key = None) -> None:
    """Cancel a job. Its training result is discarded."""
    from distill.cli.remote import JobsClient

    with JobsClient(url, key) as client:
        status = client.cancel(job)["status"]
    typer.echo(f"{job} is still running and will stop." if status == "running" else f"{job} is {status}.")


def _follow(client: "JobsClient", name: str) -> None:
    """Show the events and the progress of a job until it ends. Exit with status 1 if it fails."""
    from distill.cli.console import image_bar

    with image_bar("distilling", None) as bar:
        for job, events in client.follow(name):
            for event in events:
                bar.print(_line(event))
            bar.update(job["images_seen"], total=job["images_total"])
    if job["status"] != "succeeded":
        error = job["error"]
        typer.echo(f"error: {name} {job['status']}" + (f": {error['message']}" if error else ""), err=True)
        raise typer.Exit(1)
    typer.echo(f"The student is {job['fine_tuned_model']}.")


def _line(event: dict[str, Any]) -> str:
    """Format an event as a line: time, message and the most important metrics."""
    import time

    from distill.cli.console import SHOWN

    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["created_at"]))
    data = event["data"] or {}
    metrics = [f"{name} {data[name]:.3g}" for name in SHOWN if isinstance(data.get(name), int | float)]
    return "  ".join([when, event["message"], *metrics])
