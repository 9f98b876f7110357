"""Reads settings: command line, then `SERVICE_*` environment variables, then a TOML file, then defaults."""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

from service.errors import StartError
from service.settings import PREFIX, Settings, keys

COMMAND_VARIABLES = ("SERVICE_CONFIG", "SERVICE_KEY")  # variables for options of commands, which are not settings
# What Kubernetes sets for Services named `service` or `service-...`, as NAME=VALUE: SERVICE_PORT=tcp://10.0.0.1:80,
# SERVICE_PORT_80_TCP_ADDR=10.0.0.1, SERVICE_SERVICE_HOST=10.0.0.1, SERVICE_API_SERVICE_PORT_HTTP=80
_SERVICE_LINK = re.compile(
    r"SERVICE_(\w+_)?(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=.*|PORT=\w+://.*|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?=.*)",
    re.IGNORECASE | re.DOTALL,
)


class _Environment(EnvSettingsSource):
    """Settings in the environment. A list that is not JSON is named."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError as error:
            known = next(key for key in keys() if key.rpartition(".")[2] == field_name)
            example = f'{_variable(known)}=\'["one", "two"]\''
            raise StartError(f"{known} ({_variable(known)}): {error}; lists are JSON, as {example}") from None


def read_settings(given: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Read the settings: the given ones (by group) win over the environment, and that over the TOML file.

    Raises StartError naming the key or variable that is wrong.
    """
    _check_variables()
    stored = {} if file is None else _read_toml(file)
    try:
        return Settings(**_merged(_merged(stored, _Environment(Settings)()), given))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # the input may be a key
        raise StartError(_complaint(first["loc"], first["type"], first["msg"])) from None


def nested(flags: Mapping[str, object], assignments: Sequence[str] | None) -> dict[str, Any]:
    """Return the settings of the command line as nested groups: flags by key, without None, then `--set key=value`."""
    given = {key: value for key, value in flags.items() if value is not None}
    for assignment in assignments or ():
        key, equals, text = assignment.partition("=")
        if not equals:
            raise StartError(f"--set {key}: write it as key=value, for example engine.max_batch=8")
        try:
            given[key] = json.loads(text) if text.startswith(("[", "{")) else text
        except ValueError as error:
            raise StartError(f"--set {key}: {error}; lists are JSON") from None  # without the value, which may be a key
    groups: dict[str, Any] = {}
    for key, value in given.items():
        group, _, name = key.partition(".")
        if not name:  # a whole group leaves what it does not name
            before = groups.get(key)
            groups[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
        elif isinstance(outer := groups.setdefault(group, {}), dict):
            outer[name] = value
    return groups


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        name: _merged(below[name], group)
        for name, group in above.items()
        if isinstance(group, Mapping) and isinstance(below.get(name), Mapping)
    }
    return {**below, **above, **nested}


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))  # accepts a byte order mark
    except OSError as error:
        raise StartError(f"the settings file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StartError(f"{file} is not UTF-8; save it in that encoding") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise StartError(f"{file} is not TOML: {error}") from None


def variables() -> list[str]:
    return [_variable(key) for key in keys()]


def _variable(key: str, prefix: str = PREFIX) -> str:
    return prefix + key.replace(".", "__").upper()


def _check_variables() -> None:
    """Raise StartError for an environment variable that looks like a setting but is not one."""
    known = {*variables(), *COMMAND_VARIABLES}
    for name, value in os.environ.items():
        upper = name.upper()  # variables of settings are read in either case
        if upper.startswith(PREFIX) and upper not in known and not _SERVICE_LINK.fullmatch(f"{name}={value}"):
            close = _nearest(upper.removeprefix(PREFIX).lower().replace("__", "."))
            advice = f"did you mean {_variable(close)}?" if close else "docs/operations.md lists the settings"
            raise StartError(f"there is no setting for the variable {name}; {advice}")


def _complaint(location: tuple[int | str, ...], kind: str, message: str) -> str:
    """One sentence for an error of pydantic, which names the key and the variable, or the nearest key."""
    path = ".".join(str(part) for part in location)
    key = next((key for key in keys() if f"{path}.".startswith(f"{key}.")), None)
    if kind == "extra_forbidden":
        close = _nearest(path, [] if "." in path else list(Settings.model_fields))
        return f"there is no setting {path!r}" + (f"; did you mean {close!r}?" if close else "")
    if key is not None:
        return f"{key} ({_variable(key)}): {message.removeprefix('Value error, ')}"
    return f"{path} is a group of settings: a table in the file, {path}.NAME on the command line"


def _nearest(key: str, groups: Collection[str] = ()) -> str | None:
    """Return the key that a wrong one probably means: one of the same name in another group, or one spelled alike."""
    name = key.rpartition(".")[2]
    same = [known for known in keys() if known.rpartition(".")[2] == name]
    return next(iter([*same, *difflib.get_close_matches(key, [*keys(), *groups], 1)]), None)
