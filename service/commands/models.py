"""`fgm-service models`: manage the students and adapters of a running server."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.commands.remote import RemoteServer

app = typer.Typer(help="List, load and unload the students and adapters of a running server.", no_args_is_help=True)

LOCAL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(help="URL of the running server.")]
AdminKey = Annotated[
    str | None, typer.Option(envvar="SERVICE_KEY", help="API key with the scope admin, if the server requires keys.")
]
Student = Annotated[str, typer.Option(help="Student of the adapter, a name of `models list`.")]


@app.command("list")
def index(url: Url = LOCAL, key: AdminKey = None) -> None:
    """List the loaded students with sizes, adapters and aliases, and the students and adapters that can be loaded.

    The default student comes first. What can be loaded are the folders below the server's setting `models_folder`.

        fgm-service models list --url http://127.0.0.1:8000 --key fgm-...
    """
    with _server(url, key) as server:
        found = server.request("GET", "models")
    rows = [["student", "sizes", "adapters", "aliases"]]
    for model in found["data"]:
        rows.append([model["id"], *(",".join(model[column]) or "-" for column in rows[0][1:])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"students to load: {', '.join(found['folders']) or 'none'}")
    print(f"adapters to load: {', '.join(found['adapter_folders']) or 'none'}")


@app.command("load")
def load(
    folder: Annotated[str, typer.Argument(help="Name of a student that `models list` shows, not a path.")],
    name: Annotated[str | None, typer.Option(help="Model name [the student's own].")] = None,
    url: Url = LOCAL,
    key: AdminKey = None,
) -> None:
    """Load a student without interrupting the server. Returns when requests can use it.

    fgm-service models load sd3-medium --name new
    """
    with _server(url, key) as server:
        loaded = server.request("POST", "models", json={"folder": folder, "name": name})
    print(f"{loaded['id']} is loaded.")


@app.command("unload")
def unload(
    name: Annotated[str, typer.Argument(help="Name of the student.")], url: Url = LOCAL, key: AdminKey = None
) -> None:
    """Unload a student. Returns when its accepted requests are answered. Its files are kept."""
    with _server(url, key) as server:
        server.request("DELETE", "models", name)
    print(f"{name} is unloaded.")


@app.command("load-adapter")
def load_adapter(
    folder: Annotated[str, typer.Argument(help="Name of an adapter that `models list` shows, not a path.")],
    model: Student,
    name: Annotated[str | None, typer.Option(help="Adapter name [the folder's].")] = None,
    url: Url = LOCAL,
    key: AdminKey = None,
) -> None:
    """Load a LoRA adapter for a student; requests can then name it in `lora`.

    fgm-service models load-adapter sketches --model new --name sketch

    curl 127.0.0.1:8000/v1/images/generations --json '{"model": "new", "prompt": "a cat", "lora": {"name": "sketch"}}'
    """
    with _server(url, key) as server:
        given = {"model": model, "folder": folder, "name": name or folder}
        loaded = server.request("POST", "adapters", json=given)
    print(f"Adapters of {loaded['id']}: {', '.join(loaded['adapters'])}.")


@app.command("unload-adapter")
def unload_adapter(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    model: Student,
    url: Url = LOCAL,
    key: AdminKey = None,
) -> None:
    """Unload an adapter of a student. Returns when its accepted requests are answered. Its file is kept."""
    with _server(url, key) as server:
        server.request("DELETE", "adapters", name, params={"model": model})
    print(f"{name} of {model} is unloaded.")


def _server(url: str, key: str | None) -> "RemoteServer":
    from service.commands.remote import RemoteServer  # its HTTP client would slow down the start of other commands

    return RemoteServer(url, key)
