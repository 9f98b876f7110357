"""The `fgm-service` command. Imports no torch before it serves."""

from service.commands.signals import end_on_signals

end_on_signals()  # before the other imports: a container may be stopped while they run

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands import keys, models
from service.errors import StartError

if TYPE_CHECKING:
    from service.settings import Settings

# The libraries' progress bars and notices would run through the log, also of the worker processes.
for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

app = typer.Typer(help="Serve one-step students over REST.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(keys.app, name="keys")
app.add_typer(models.app, name="models")


@app.command()
def serve(
    model: Annotated[
        list[Path] | None, typer.Option(help="Student folder; repeat for more, the first is the default.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1]; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000]; 0 picks a free one.")] = None,
    devices: Annotated[
        str | None, typer.Option("--devices", "--device", help="auto, cpu, simulator, or GPUs as cuda:0,cuda:1.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Worker processes on each device.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of files, batches and jobs; none to serve without them.")
    ] = None,
    job_devices: Annotated[
        str | None,
        typer.Option(help="Devices of distillation jobs [cpu]: cpu, GPUs as cuda:1,cuda:2, or none: others run them."),
    ] = None,
    keys_file: Annotated[
        Path | None, typer.Option(help="File of API keys; `fgm-service keys create` adds one.")
    ] = None,
    open_to_all: Annotated[
        bool | None, typer.Option("--open-to-all", help="Listen beyond this machine without any API key.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(envvar="SERVICE_CONFIG", help="TOML file of settings; what else is given wins.")
    ] = None,
) -> None:
    """Serve students (the shipped one if none is named) in the OpenAI Images format, and a playground at `/`.

    Every setting has a SERVICE_ variable (SERVICE_MAX_BATCH, SERVICE_RATE_LIMIT, ...) and a key in the TOML file;
    docs/operations.md lists them. SIGTERM finishes what was accepted, then ends; a second one ends at once.
    """
    import logging
    from concurrent.futures import ThreadPoolExecutor

    from uvicorn.config import STARTUP_FAILURE

    from service.engine.launch import worker_processes
    from service.http.graceful_server import GracefulServer, uvicorn_config
    from service.observability.logs import configure
    from service.settings import read_settings

    given: dict[str, Any] = {
        "models": tuple(model or ()) or None,
        "host": host,
        "port": port,
        "devices": devices,
        "replicas": replicas,
        "data": None if data is None else str(data),
        "job_devices": job_devices,
        "keys_file": keys_file,
        "open_to_all": open_to_all,
    }
    settings = read_settings({name: value for name, value in given.items() if value is not None}, config)
    _check_keys(settings)
    workers = worker_processes(settings)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(workers.start)  # before the server does, so that a bad folder is one sentence
        from service.app import create_app  # takes a second, in which the workers load their models

        served = create_app(settings, workers)
        if served.state.jobs:
            served.state.jobs.check()  # before the server starts, so that a wrong database is one sentence
        ready = starting.result()[0].ready
    settings.check_aliases([loaded.info.name for loaded in ready.models])
    configure(settings.log_format, settings.log_level)
    for line in settings.lines():
        logging.getLogger("service.settings").info(line)
    server = GracefulServer(uvicorn_config(served, settings))
    server.run()
    if not server.started:
        sys.exit(STARTUP_FAILURE)
    logging.shutdown()
    os._exit(0)  # Python would wait for every thread, including one that waits forever for a store or a disk


@app.command()
def profile(
    out: Annotated[Path, typer.Argument(help="Folder of the profiles; the server's `profiles` setting names it.")],
    model: Annotated[list[Path] | None, typer.Option(help="Student folder; repeat for more.")] = None,
    devices: Annotated[str | None, typer.Option("--devices", "--device", help="As of `serve`.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Largest batch to measure [16].")] = None,
    config: Annotated[Path | None, typer.Option(envvar="SERVICE_CONFIG", help="TOML file of settings.")] = None,
) -> None:
    """Measure seconds by stage, and memory, of every size and batch of each model on each device.

    A server that is started with SERVICE_PROFILES=FOLDER makes no batch that was not measured, or, with
    SERVICE_P95_SECONDS, that would be too slow; and it knows from its first request on how long the queue will take.
    What the folder knows already is shown without measuring; delete a file to have it measured again.

        fgm-service profile profiles --max-batch 8

        SERVICE_PROFILES=profiles SERVICE_P95_SECONDS=0.5 fgm-service serve
    """
    from service.engine.launch import worker_processes
    from service.settings import read_settings

    given = {"profiles": out, "models": tuple(model or ()) or None, "devices": devices, "max_batch": max_batch}
    settings = read_settings({name: value for name, value in given.items() if value is not None}, config)
    workers = worker_processes(settings).start()
    print("device      model                     size       batch   text ms  model ms    vae ms  images/s  memory MB")
    for worker in workers:
        for t in (timing for loaded in worker.ready.models for timing in loaded.timings):
            stages = "".join(f"{1000 * t.seconds[stage]:10.2f}" for stage in ("text", "model", "vae"))
            size = f"{t.width}x{t.height}"
            rate, memory = t.batch / t.total, t.memory_bytes / 1e6
            print(f"{worker.name:11} {t.model:25} {size:10} {t.batch:5}{stages}{rate:10.1f}{memory:11.0f}")
        worker.end()


@app.command()
def bench(
    url: Annotated[str | None, typer.Option(help="A running server; none starts one of the shipped student.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="That ask at once, each again when it is answered.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time of the load.")] = 10.0,
    key: Annotated[str | None, typer.Option(envvar="SERVICE_KEY", help="API key of the server.")] = None,
) -> None:
    """Load a server with requests that no cache knows; print requests/s, latencies and batches.

    Without --url it starts a server of its own, with the SERVICE_ variables that are set, and before it the engine
    alone: `share of the engine` is what is left of the engine's rate after HTTP and image formats.

        fgm-service bench --clients 8 --seconds 20

        fgm-service bench --url http://127.0.0.1:8000 --key fgm-...
    """
    import contextlib

    from service.commands.bench import free_port, load_engine, load_server, own_server, samples
    from service.settings import read_settings

    with contextlib.ExitStack() as stack:
        engine = None
        if url is None:
            engine = load_engine(read_settings({}), clients, seconds)
            port = free_port()
            url = stack.enter_context(
                own_server([sys.executable, "-m", "service.cli", "serve", "--port", str(port)], port)
            )
        before = samples(url)
        load = load_server(url, clients, seconds, key)
        after = samples(url)
        batches, images = (after[name] - before[name] for name in ("fgm_batch_images_count", "fgm_batch_images_sum"))
    print(f"clients              {clients}")
    print(f"requests/s           {load.rate:.1f}")
    for share in (0.5, 0.95, 0.99):
        print(f"p{100 * share:.0f} ms               {1000 * load.quantile(share):.1f}")
    print(f"refused              {load.refused}")
    print(f"images in a batch    {images / max(batches, 1):.1f}")
    if engine is not None:
        print(f"engine alone/s       {engine.rate:.1f}")
        print(f"share of the engine  {load.rate / engine.rate:.2f}")


@app.command()
def ray(
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="A Ray cluster; auto is the one that this machine belongs to, local starts one of this machine alone.",
        ),
    ] = "local",
    min_replicas: Annotated[int, typer.Option(min=1, help="Replicas at least.")] = 1,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Replicas at most [as many as at least].")] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPU cores that Ray counts for each replica.")] = 1.0,
    patience: Annotated[float, typer.Option(min=0.01, help="Seconds in which they should make what waits.")] = 2.0,
    up_after: Annotated[float, typer.Option(min=0, help="Seconds of need before replicas are added.")] = 30.0,
    down_after: Annotated[float, typer.Option(min=0, help="The same before they are taken away.")] = 600.0,
    guests: Annotated[
        int, typer.Option(min=1, help="Students and LoRA adapters in a replica at once because requests ask for them.")
    ] = 3,
    config: Annotated[
        Path | None, typer.Option(envvar="SERVICE_CONFIG", help="TOML file of settings; SERVICE_ variables win.")
    ] = None,
) -> None:
    """Serve as `serve` does, by replicas over the GPUs of one machine or of a Ray cluster.

    Each replica is a whole server on a GPU of its own, or on CPU cores; there are more of them while work waits.
    docs/ray.md says what they share. SIGTERM finishes what was accepted, then ends.
    """
    import importlib.util

    from service.observability.logs import configure
    from service.settings import read_settings

    if importlib.util.find_spec("ray") is None:
        raise StartError("Ray is not installed; pip install 'flow-generator-matching[ray]'")
    settings = read_settings({}, config)
    _check_keys(settings)
    from service.ray import cluster

    configure(settings.log_format, settings.log_level)
    most = max(min_replicas, max_replicas or 0)
    scale = cluster.Scale(min_replicas, most, cpus, patience, up_after, down_after, guests)
    cluster.run(settings, scale, address)


def _check_keys(settings: "Settings") -> None:
    """Raises StartError for a server that anyone may reach and use."""
    from service.http.keys import KeyFile
    from service.http.origins import is_loopback

    stored = KeyFile(settings.keys_file).read_at_start() if settings.keys_file else ()
    if settings.api_keys or stored:
        return
    if settings.open_to_all and settings.keys_file:
        raise StartError(
            f"{settings.keys_file} (keys_file) has no key, and open_to_all would let everyone in without one; make one "
            f"with `fgm-service keys create NAME --file {settings.keys_file}`, or leave one of the two settings out"
        )
    if not (settings.open_to_all or is_loopback(settings.host)):
        raise StartError(
            f"host {settings.host} is reached from other machines and there is no API key; make one with "
            "`fgm-service keys create` and name its file with --keys-file, or say --open-to-all"
        )


def main() -> None:
    """Entry point of the console command: what keeps the server from starting is one sentence and status 2."""
    try:
        app()
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
