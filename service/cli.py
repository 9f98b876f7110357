"""The `fgm-service` command. Imports no torch before it serves."""

from service.commands.signals import end_on_signals

end_on_signals()  # before the other imports: a container may be stopped while they run

import json
import os
import sys
from collections.abc import Mapping, Sequence
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

Config = Annotated[
    Path | None, typer.Option(envvar="SERVICE_CONFIG", help="TOML file of settings; flags and variables win over it.")
]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting, as engine.max_batch=8; repeat for more. Lists are JSON.")
]

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
    config: Config = None,
    setting: Setting = None,
) -> None:
    """Serve students (the shipped one if none is named) in the OpenAI Images format, and a playground at `/`.

    docs/operations.md lists all settings. Each can be set by --set engine.max_batch=8, by the environment variable
    SERVICE_ENGINE__MAX_BATCH=8, or in the TOML file. SIGTERM answers the accepted requests, then exits; a second
    signal exits at once.
    """
    import logging
    from concurrent.futures import ThreadPoolExecutor

    from uvicorn.config import STARTUP_FAILURE

    from service.engine.launch import worker_processes
    from service.http.graceful_server import GracefulServer, uvicorn_config
    from service.observability.logs import configure
    from service.settings import read_settings

    given = {
        "models": tuple(model or ()) or None,
        "data": None if data is None else str(data),
        "engine.devices": devices,
        "http.host": host,
        "http.port": port,
        "http.keys_file": keys_file,
        "http.open_to_all": open_to_all,
        "jobs.devices": job_devices,
    }
    settings = read_settings(_given(given, setting), config)
    _check_keys(settings)
    workers = worker_processes(settings)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(workers.start)  # before the server does, so that a bad folder is one sentence
        from service.app import create_app  # takes a second, in which the workers load their models

        served = create_app(settings, workers)
        if served.state.jobs:
            served.state.jobs.prepare()  # before the server starts, so that a wrong database is one sentence
        ready = starting.result()[0].ready
    settings.check_aliases([loaded.info.name for loaded in ready.models])
    configure(settings.observability.log_format, settings.observability.log_level)
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
    out: Annotated[Path, typer.Argument(help="Folder of the profiles; engine.profiles_folder of the server.")],
    model: Annotated[list[Path] | None, typer.Option(help="Student folder; repeat for more.")] = None,
    devices: Annotated[str | None, typer.Option("--devices", "--device", help="As of `serve`.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Largest batch to measure [16].")] = None,
    config: Config = None,
    setting: Setting = None,
) -> None:
    """Measure seconds by stage, and memory, of every size and batch of each model on each device.

    A server with engine.profiles_folder only runs batch sizes that were measured, and knows from its first request on
    how long the queue takes. With engine.target_p95_seconds it also skips sizes that are too slow. Profiles that the
    folder already has are printed without measuring; delete a file to measure again.

        fgm-service profile profiles --max-batch 8

        fgm-service serve --set engine.profiles_folder=profiles --set engine.target_p95_seconds=0.5
    """
    from service.engine.launch import worker_processes
    from service.settings import read_settings

    given = {
        "models": tuple(model or ()) or None,
        "engine.devices": devices,
        "engine.max_batch": max_batch,
        "engine.profiles_folder": out,
    }
    settings = read_settings(_given(given, setting), config)
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
    target_queue_seconds: Annotated[
        float, typer.Option(min=0.01, help="Seconds in which they should make what waits.")
    ] = 2.0,
    up_after: Annotated[float, typer.Option(min=0, help="Seconds of need before replicas are added.")] = 30.0,
    down_after: Annotated[float, typer.Option(min=0, help="The same before they are taken away.")] = 600.0,
    guests: Annotated[
        int, typer.Option(min=1, help="Students and LoRA adapters in a replica at once because requests ask for them.")
    ] = 3,
    config: Config = None,
    setting: Setting = None,
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
    settings = read_settings(_given({}, setting), config)
    _check_keys(settings)
    from service.ray import cluster

    configure(settings.observability.log_format, settings.observability.log_level)
    most = max(min_replicas, max_replicas or 0)
    scale = cluster.Scale(min_replicas, most, cpus, target_queue_seconds, up_after, down_after, guests)
    cluster.run(settings, scale, address)


def _given(flags: Mapping[str, object], assignments: Sequence[str] | None) -> dict[str, Any]:
    """Settings given on the command line, by group: flags by key (None is not given), and `--set key=value`."""
    given = {key: value for key, value in flags.items() if value is not None}
    for assignment in assignments or ():
        key, equals, text = assignment.partition("=")
        if not equals:
            raise StartError(f"--set {assignment}: write it as key=value, for example engine.max_batch=8")
        try:
            given[key] = json.loads(text) if text.startswith(("[", "{")) else text
        except ValueError as error:
            raise StartError(f"--set {assignment}: {error}; lists are JSON") from None
    nested: dict[str, Any] = {}
    for key, value in given.items():
        group, _, name = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    return nested


def _check_keys(settings: "Settings") -> None:
    """Raises StartError for a server that anyone may reach and use."""
    from service.http.keys import KeyFile
    from service.http.origins import is_loopback

    http = settings.http
    stored = KeyFile(http.keys_file).read_at_start() if http.keys_file else ()
    if http.api_keys or stored:
        return
    if http.open_to_all and http.keys_file:
        raise StartError(
            f"{http.keys_file} (http.keys_file) has no key, and http.open_to_all would let everyone in without one; "
            f"make one with `fgm-service keys create NAME --file {http.keys_file}`, or leave out one of the settings"
        )
    if not (http.open_to_all or is_loopback(http.host)):
        raise StartError(
            f"host {http.host} is reached from other machines and there is no API key; make one with "
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
