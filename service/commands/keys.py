"""`fgm-service keys`: manage the file of API keys."""

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from service.http.keys import KeyFile

app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)

File = Annotated[Path, typer.Option(envvar="SERVICE_HTTP__KEYS_FILE", help="File of API keys, as for `serve`.")]


class Scope(StrEnum):
    """Scopes of a key. Typer supports lists of enums, but not of literals."""

    generate = "generate"
    jobs = "jobs"
    admin = "admin"


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Owner of the key; logs and limits use this name.")],
    keys_file: File,
    scope: Annotated[list[Scope] | None, typer.Option(help="Scope of the key. Repeatable [generate].")] = None,
) -> None:
    """Create a key and print it. It is shown only once: the file holds its hash.

        fgm-service keys create ann --keys-file keys.json --scope generate --scope jobs

        fgm-service serve --host 0.0.0.0 --keys-file keys.json

    A running server with this file accepts the key from its next request on.
    """
    print(KeyFile(keys_file).create(name, [each.value for each in scope or [Scope.generate]]))


@app.command("list")
def index(keys_file: File) -> None:
    """Print owner, scopes and creation date of every key."""
    for key in KeyFile(keys_file).existing():
        print(f"{key.owner}\t{','.join(sorted(key.scopes))}\t{datetime.fromtimestamp(key.created, UTC):%Y-%m-%d}")


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="Owner of the key.")], keys_file: File) -> None:
    """Delete a key. A running server refuses it from its next request on."""
    KeyFile(keys_file).revoke(name)
