"""`distill submit`, `jobs`, `logs` and `cancel`: distillations that a server does."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.cli.options import Seconds

if TYPE_CHECKING:
    from distill.cli.remote import Server as Remote

Server = Annotated[str, typer.Option("--server", envvar="DISTILL_SERVER", help="Address of the server.")]
ServerKey = Annotated[
    str | None, typer.Option("--api-key", envvar="DISTILL_API_KEY", help="Key with the scope jobs, if it wants one.")
]
LOOPBACK = "http://127.0.0.1:8000"


def submit(
    prompts: Annotated[Path, typer.Argument(help="Prompts: a txt, json, jsonl, csv, tsv or parquet file.")],
    teacher: Annotated[str, typer.Option(help="Teacher, by the name that the server has for it.")] = "scenes",
    preset: Annotated[str | None, typer.Option(help="Preset; scenes for that teacher if not given.")] = None,
    method: Annotated[str | None, typer.Option(help="A method in place of the preset's: fgm, dmd, ...")] = None,
    images: Annotated[int | None, typer.Option(help="Budget in images; the preset's.", min=1)] = None,
    seconds: Seconds = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="name=value of the job's distillation object, as rank=16.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="For the student's name, ft:TEACHER:SUFFIX:ID.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run; drawn if not given.", min=0)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay and watch it to its end.")] = False,
    server: Server = LOOPBACK,
    api_key: ServerKey = None,
) -> None:
    """Let a server distill one of its teachers, and serve the student."""
    from distill.cli.remote import Server as Remote
    from distill.config import parse_override
    from distill.errors import ConfigError

    given: dict[str, Any] = {"preset": preset, "method": method, "images": images, "seconds": seconds}
    for override in overrides or []:
        name, value = parse_override(override)
        try:
            given[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise ConfigError(f"--set {override}: the value is no text and no finite number") from None
    asked = {name: value for name, value in given.items() if value is not None}
    with Remote(server, api_key) as remote:
        fields = {"model": teacher, "suffix": suffix, "seed": seed, "distillation": asked}
        job = remote.submit(prompts, fields)
        typer.echo(f"{job['id']} is {job['status']}; `distill logs {job['id']}` tells how it goes.")
        if follow:
            _follow(remote, job["id"])


def jobs(
    limit: Annotated[int, typer.Option(help="How many at most, the newest.", min=1, max=100)] = 20,
    server: Server = LOOPBACK,
    api_key: ServerKey = None,
) -> None:
    """List a server's distillation jobs: id, status, progress, creation time, teacher, student."""
    import time

    from distill.cli.remote import Server as Remote
    from distill.report.html import si

    with Remote(server, api_key) as remote:
        found = remote.jobs(limit)
    for job in found:
        seen = f"{si(job['images_seen'])} / {si(job['images_total'])}" if job["images_total"] else "-"
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created_at"]))
        words = (job["id"], job["status"], seen, made, job["model"], job["fine_tuned_model"] or "-")
        typer.echo("\t".join(words))


def logs(
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    follow: Annotated[bool, typer.Option("--follow", help="Stay and watch it to its end.")] = False,
    server: Server = LOOPBACK,
    api_key: ServerKey = None,
) -> None:
    """Print what a job has told: progress, metrics, alarms."""
    from distill.cli.remote import Server as Remote

    with Remote(server, api_key) as remote:
        if follow:
            _follow(remote, job)
            return
        for event in remote.events(job):
            typer.echo(_told(event))


def cancel(
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    server: Server = LOOPBACK,
    api_key: ServerKey = None,
) -> None:
    """End a job; what it has learnt is not kept."""
    from distill.cli.remote import Server as Remote

    with Remote(server, api_key) as remote:
        status = remote.cancel(job)["status"]
    typer.echo(f"{job} is still running, and ends now." if status == "running" else f"{job} is {status}.")


def _follow(remote: "Remote", name: str) -> None:
    """A job's events and a bar, to its end; a job that fails ends the command with status 1."""
    from distill.cli.console import image_bar

    with image_bar("distilling", None) as bar:
        for job, events in remote.follow(name):
            for event in events:
                bar.say(_told(event))
            bar.update(job["images_seen"], total=job["images_total"])
    if job["status"] != "succeeded":
        error = job["error"]
        typer.echo(f"error: {name} {job['status']}" + (f": {error['message']}" if error else ""), err=True)
        raise typer.Exit(1)
    typer.echo(f"The student is {job['fine_tuned_model']}.")


def _told(event: dict[str, Any]) -> str:
    """An event as a line: when, what, and the metrics that people follow."""
    import time

    from distill.cli.console import SHOWN

    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["created_at"]))
    data = event["data"] or {}
    metrics = [f"{name} {data[name]:.3g}" for name in SHOWN if isinstance(data.get(name), int | float)]
    words = [when, event["message"], *metrics]
    return "  ".join(words)
