"""The `fgm-service` command: parse, call, print. Only the worker processes import torch."""

from service.signals import exit_on_signals

exit_on_signals()  # before the other imports: a container may be stopped while they run

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from service.commands import keys, models
from service.errors import StartError

# Keep the libraries' progress bars and notices out of the log, also in worker processes.
for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

Config = Annotated[
    Path | None,
    typer.Option(envvar="SERVICE_CONFIG", help="TOML file of settings; flags and SERVICE_ variables override it."),
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, for example engine.max_batch=8. Repeatable. Lists are JSON."),
]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(keys.app, name="keys")
app.add_typer(models.app, name="models")


def _print_version(wanted: bool) -> None:
    if wanted:
        from service.version import NAME, VERSION

        typer.echo(f"{NAME} {VERSION}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Serve one-step students over REST."""


@app.command()
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Student folder, or NAME=FOLDER. Repeatable; the first is the default model."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1]; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000]; 0 picks a free one.")] = None,
    devices: Annotated[
        str | None, typer.Option("--devices", "--device", help="auto, cpu, simulator, or GPUs as cuda:0,cuda:1.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder for files, batches and jobs; `none` disables them.")] = None,
    job_devices: Annotated[
        str | None,
        typer.Option(help="Devices of distillation jobs [cpu]: cpu, GPUs as cuda:1,cuda:2, or none to run no jobs."),
    ] = None,
    keys_file: Annotated[
        Path | None, typer.Option(help="File of API keys; `fgm-service keys create` adds one.")
    ] = None,
    open_to_all: Annotated[
        bool | None, typer.Option("--open-to-all", help="Accept requests from other machines without API keys.")
    ] = None,
    config: Config = None,
    setting: Setting = None,
) -> None:
    """Serve students over the OpenAI Images API, with a playground at `/`. Without --model, serve the shipped student.

    docs/operations.md lists all settings. Give one as --set engine.max_batch=8, as the environment variable
    SERVICE_ENGINE__MAX_BATCH=8, or in a TOML file. At SIGTERM the server answers the accepted requests, then exits. A
    second signal ends it at once.
    """
    from service.commands.serve import needs_key, run_server
    from service.http.address import bind
    from service.observability.logs import configure
    from service.settings_reader import nested, read_settings

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
    settings = read_settings(nested(given, setting), config)
    key_needed, names = needs_key(settings), ", ".join(settings.students())
    with contextlib.ExitStack() as listening:
        sockets = [listening.enter_context(each) for each in bind(settings.http.host, settings.http.port)]
        settings.check_paths()
        configure(settings.observability.log_format, settings.observability.log_level)
        run_server(settings, sockets, names, key_needed)


@app.command()
def profile(
    out: Annotated[Path, typer.Argument(help="Folder of the profiles; engine.profiles_folder of the server.")],
    model: Annotated[list[str] | None, typer.Option(help="Student folder, or NAME=FOLDER. Repeatable.")] = None,
    devices: Annotated[str | None, typer.Option("--devices", "--device", help="As for `serve`.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Largest batch to measure [16].")] = None,
    config: Config = None,
    setting: Setting = None,
) -> None:
    """Measure the time of each stage, and memory, for every image size and batch size of each model on each device.

    A server with engine.profiles_folder only runs batch sizes that were measured, and knows from its first request on
    how long the queue takes. With engine.target_p95_seconds it also skips sizes that are too slow. Profiles that the
    folder already has are printed without measuring; delete a file to measure again.

        fgm-service profile profiles --max-batch 8

        fgm-service serve --set engine.profiles_folder=profiles --set engine.target_p95_seconds=0.5
    """
    from service.engine.launch import worker_processes
    from service.settings_reader import nested, read_settings

    given = {
        "models": tuple(model or ()) or None,
        "engine.devices": devices,
        "engine.max_batch": max_batch,
        "engine.profiles_folder": out,
    }
    settings = read_settings(nested(given, setting), config)
    settings.students()
    settings.check_paths()
    pool = worker_processes(settings)
    workers = pool.start()
    print("device      model                     size       batch   text ms  model ms    vae ms  images/s  memory MB")
    for worker in workers:
        for t in (timing for loaded in worker.ready.models for timing in loaded.timings):
            stages = "".join(f"{1000 * t.seconds[stage]:10.2f}" for stage in ("text", "model", "vae"))
            size = f"{t.width}x{t.height}"
            rate, memory = t.batch / t.total(), t.memory_bytes / 1e6
            print(f"{worker.name:11} {t.model:25} {size:10} {t.batch:5}{stages}{rate:10.1f}{memory:11.0f}")
    pool.end()


@app.command()
def bench(
    url: Annotated[str | None, typer.Option(help="URL of a running server; by default, one is started.")] = None,
    clients: Annotated[
        int, typer.Option(min=1, help="Concurrent clients; each sends its next request when it has a response.")
    ] = 32,
    seconds: Annotated[float, typer.Option(min=0.1, help="Duration of the load test in seconds.")] = 10.0,
    key: Annotated[str | None, typer.Option(envvar="SERVICE_KEY", help="API key of the server.")] = None,
) -> None:
    """Run a load test with requests that miss all caches; print requests/s, latencies and batch sizes.

    Without --url, first measure the engine alone, then a server that is started with the SERVICE_ variables. `share of
    the engine` is the server's rate divided by the engine's: the rest is HTTP and image encoding.

        fgm-service bench --clients 8 --seconds 20

        fgm-service bench --url http://127.0.0.1:8000 --key fgm-...
    """
    from service.commands.bench import free_port, measure_engine, measure_server, read_metrics, running_server
    from service.settings_reader import read_settings

    with contextlib.ExitStack() as stack:
        engine = None
        if url is None:
            engine = measure_engine(read_settings({}), clients, seconds)
            port = free_port()
            url = stack.enter_context(
                running_server([sys.executable, "-m", "service.cli", "serve", "--port", str(port)], port)
            )
        before = read_metrics(url)
        load = measure_server(url, clients, seconds, key)
        after = read_metrics(url)
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
            help="Ray cluster: an address, auto for this machine's cluster, or local to start one on this machine.",
        ),
    ] = "local",
    min_replicas: Annotated[int, typer.Option(min=1, help="Minimum number of replicas.")] = 1,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Maximum number of replicas [the minimum].")] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPU cores that Ray reserves for each replica.")] = 1.0,
    target_queue_seconds: Annotated[
        float, typer.Option(min=0.01, help="Replicas are added if the queue is longer than this, in seconds of work.")
    ] = 2.0,
    scale_up_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds of sustained load before replicas are added.")
    ] = 30.0,
    scale_down_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds of low load before replicas are removed.")
    ] = 600.0,
    config: Config = None,
    setting: Setting = None,
) -> None:
    """Serve with replicas on the GPUs of a machine or a Ray cluster. Their number follows the load.

    Each replica is a complete server with its own GPU, or on CPU cores. docs/ray.md describes what they share. At
    SIGTERM the accepted requests are answered before it exits.
    """
    import importlib.util

    from service.commands.serve import needs_key
    from service.observability.logs import configure
    from service.ray.settings_check import check_settings
    from service.settings_reader import nested, read_settings

    if importlib.util.find_spec("ray") is None:
        raise StartError("Ray is not installed; pip install 'flow-generator-matching[ray]'")
    settings = read_settings(nested({}, setting), config)
    needs_key(settings)
    check_settings(settings, address)
    from service.ray import cluster

    configure(settings.observability.log_format, settings.observability.log_level)
    most = max(min_replicas, max_replicas or 0)
    scale = cluster.Scale(min_replicas, most, cpus, target_queue_seconds, scale_up_seconds, scale_down_seconds)
    cluster.run(settings, scale, address)


def main() -> None:
    """Run the console command. An error that prevents the start is one line on stderr, with status 2."""
    try:
        app()
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
