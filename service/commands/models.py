"""`fgm-service models`: the students and adapters of a running server."""

from typing import Annotated

import typer

app = typer.Typer(help="List, load and unload the students and adapters of a running server.", no_args_is_help=True)

LOCAL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(help="The running server.")]
AdminKey = Annotated[
    str | None, typer.Option(envvar="SERVICE_KEY", help="API key of the scope admin, where the server has keys.")
]
Student = Annotated[str, typer.Option(help="Student that the adapter is for; `models list` shows them.")]


@app.command("list")
def index(url: Url = LOCAL, key: AdminKey = None) -> None:
    """Students that are served, the default one first, with their sizes, adapters and aliases; and what may be loaded.

    What may be loaded are the folders below the server's setting `students`, by their names.

        fgm-service models list --url http://127.0.0.1:8000 --key fgm-...
    """
    from service.commands.remote import RemoteServer

    with RemoteServer(url, key) as server:
        found = server.models()
    rows = [["student", "sizes", "adapters", "aliases"]]
    for model in found.data:
        rows.append([model.id, *(",".join(names) or "-" for names in (model.sizes, model.adapters, model.aliases))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"students to load: {', '.join(found.folders) or 'none'}")
    print(f"adapters to load: {', '.join(found.adapter_folders) or 'none'}")


@app.command("load")
def load(
    folder: Annotated[str, typer.Argument(help="Name of a folder that `models list` shows, not a path.")],
    name: Annotated[str | None, typer.Option(help="To serve it by [its own].")] = None,
    url: Url = LOCAL,
    key: AdminKey = None,
) -> None:
    """Load a student while the server goes on; ends when every worker has it and requests may name it.

    fgm-service models load sd3-medium --name new
    """
    from service.commands.remote import RemoteServer

    with RemoteServer(url, key) as server:
        print(f"{server.load(folder, name).id} is served.")


@app.command("unload")
def unload(
    name: Annotated[str, typer.Argument(help="The student, by its name.")], url: Url = LOCAL, key: AdminKey = None
) -> None:
    """Serve a student no more; ends when what was accepted for it is answered. Its files stay."""
    from service.commands.remote import RemoteServer

    with RemoteServer(url, key) as server:
        server.unload(name)
    print(f"{name} is served no more.")


@app.command("load-adapter")
def load_adapter(
    folder: Annotated[str, typer.Argument(help="Name of a folder that `models list` shows, not a path.")],
    model: Student,
    name: Annotated[str | None, typer.Option(help="To ask for it by [the folder's].")] = None,
    url: Url = LOCAL,
    key: AdminKey = None,
) -> None:
    """Load a LoRA adapter for a student; requests may then name it in `lora`.

    fgm-service models load-adapter sketches --model new --name sketch

    curl http://127.0.0.1:8000/v1/images/generations --json '{"prompt": "a cat", "lora": {"name": "sketch"}}'
    """
    from service.commands.remote import RemoteServer

    with RemoteServer(url, key) as server:
        loaded = server.load_adapter(model, folder, name or folder)
    print(f"{loaded.id} has {', '.join(loaded.adapters)}.")


@app.command("unload-adapter")
def unload_adapter(
    name: Annotated[str, typer.Argument(help="The adapter, by its name.")],
    model: Student,
    url: Url = LOCAL,
    key: AdminKey = None,
) -> None:
    """Take an adapter from a student; ends when what was accepted for it is answered. Its file stays."""
    from service.commands.remote import RemoteServer

    with RemoteServer(url, key) as server:
        server.unload_adapter(model, name)
    print(f"{model} has {name} no more.")
