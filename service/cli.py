"""The `fgm-service` command. Imports no torch before it serves."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from service.errors import StartError

app = typer.Typer(help="Serve one-step students over REST.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Keeps `serve` a command of its own while it is the only one."""


@app.command()
def serve(
    model: Annotated[
        list[Path] | None, typer.Option(help="Student folder; repeat for more, the first is the default.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8000,
    devices: Annotated[
        str | None, typer.Option("--devices", "--device", help="auto, cpu, simulator, or GPUs as cuda:0,cuda:1.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Worker processes on each device.")] = None,
) -> None:
    """Serve students (the shipped one if none is named) in the OpenAI Images format.

    Further settings are environment variables: SERVICE_MAX_BATCH, SERVICE_QUEUE_LIMIT, SERVICE_API_KEYS and more.
    SIGTERM finishes what was accepted, then ends.
    """
    import uvicorn

    from service.app import create_app
    from service.engine.launch import processes
    from service.settings import read_settings

    given: dict[str, Any] = {"models": tuple(model or ()), "devices": devices, "replicas": replicas}
    settings = read_settings({name: value for name, value in given.items() if value})
    workers = processes(settings)
    workers.start()  # before the server does, so that a bad folder is one sentence
    server = create_app(settings, workers)
    uvicorn.run(server, host=host, port=port, timeout_graceful_shutdown=settings.drain_seconds)


def main() -> None:
    """Entry point of the console command: what keeps the server from starting is one sentence and status 2."""
    try:
        app()
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
