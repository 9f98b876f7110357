"""`fgm-service serve`: from settings and bound sockets to the end of the process."""

import logging
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

from service.errors import StartError
from service.http.keys import KeyFile
from service.http.origins import is_loopback
from service.settings import Settings
from service.signals import exit_at_once
from service.temporary_folders import remove_folders

log = logging.getLogger("service")


def needs_key(settings: Settings) -> bool:
    """Whether requests need an API key. Raises StartError if other machines would need none."""
    http = settings.http
    stored = KeyFile(http.keys_file).read_at_start() if http.keys_file else ()
    if http.api_keys or stored:
        return True
    if http.open_to_all and http.keys_file:
        raise StartError(
            f"{http.keys_file} (http.keys_file) has no key, and http.open_to_all would let everyone in without one; "
            "create one with "
            f"`fgm-service keys create NAME --keys-file {http.keys_file}`, or leave out one of the settings"
        )
    if not (http.open_to_all or is_loopback(http.host)):
        raise StartError(
            f"http.host {http.host} is reachable from other machines and there is no API key; make one with "
            "`fgm-service keys create NAME --keys-file keys.json` and pass its file with --keys-file, or pass "
            "--open-to-all"
        )
    return http.keys_file is not None  # a file without keys admits nobody


def run_server(settings: Settings, sockets: list[socket.socket], names: str, key_needed: bool) -> None:
    """Load the models, serve until a signal, and end the process. Raises StartError if the server cannot start.

    `names` are those of the models, for the log. `sockets` are bound and do not listen yet.
    """
    from service.engine.launch import worker_processes  # which imports NumPy: refusals need none

    # A KeyboardInterrupt could be lost in the imports below, because Python ignores exceptions of weakref callbacks.
    signal.signal(signal.SIGINT, exit_at_once)
    workers = worker_processes(settings)
    log.info("loading %s on %s", names, ", ".join(workers.devices))
    for line in settings.lines():
        log.info("setting %s", line)
    with ThreadPoolExecutor(1) as pool:
        try:
            workers.launch()
            starting = pool.submit(workers.start)  # first: an invalid folder gives a one-line error
            from uvicorn.config import STARTUP_FAILURE

            from service.app import create_app  # takes a second, while the workers load their models
            from service.http.graceful_server import GracefulServer, uvicorn_config

            served = create_app(settings, workers)
            if served.state.jobs:
                served.state.jobs.prepare()  # before the server, so that an unusable database gives a one-line error
            started = starting.result()
        except BaseException:
            workers.end()  # or the pool would wait until their models are loaded and measured
            raise
    settings.check_aliases([loaded.info.name for loaded in started[0].ready.models])

    def announce() -> None:
        host, port = sockets[0].getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        devices = ", ".join(dict.fromkeys(worker.device for worker in started))
        keys = "an API key is required" if key_needed else "no API key is required"
        served_names = ", ".join(loaded.info.name for loaded in started[0].ready.models)
        log.info("serving %s on %s at %s; %s", served_names, devices, url, keys)

    server = GracefulServer(uvicorn_config(served, settings), announce)
    try:
        for bound in sockets:
            bound.listen()  # two servers can bind one address before either listens; uvicorn would log a traceback
        server.run(sockets)
    except OSError as error:  # another process took the address while the models were loaded
        log.error("%s:%s cannot be used: %s", settings.http.host, settings.http.port, error.strerror)
    logging.shutdown()
    remove_folders()
    # Python would wait for every thread, also for one that hangs on a store or a disk.
    os._exit(0 if server.started else STARTUP_FAILURE)
