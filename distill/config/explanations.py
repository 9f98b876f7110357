"""Errors of pydantic as sentences that name the key of a configuration."""

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from distill import methods
from distill.config.run_config import Full, Lora, RunConfig

_short = reprlib.Repr()  # a wrong value may hold millions of others
_short.maxlevel, _short.maxstring, _short.maxother = 3, 200, 200


def explain(error: ValidationError) -> str:
    """Turn a pydantic error into a sentence; of a union's members, that of the deepest key."""
    first = max(error.errors(), key=lambda each: len(each["loc"]))
    where = _keys_of(first["loc"])
    if first["type"] == "extra_forbidden":
        where = [*_keys_of(first["loc"][:-1]), str(first["loc"][-1])]
        if where[-1] in _keys_beside(where):
            return f"{'.'.join(where)} belongs to another kind of {where[0]}; leave it out, or choose that kind"
        return f"unknown key {'.'.join(where)!r}{nearest(where[-1], _keys_beside(where))}"
    kinds = " or ".join(kind.model_fields["kind"].default for kind in (Full, Lora))
    if first["type"] == "union_tag_not_found":
        return f"networks.kind is missing; with other keys of networks, set it to {kinds}"
    if first["type"] == "union_tag_invalid":
        return f"networks.kind: there is no {first['input']['kind']!r}; take {kinds}"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{'.'.join(where)} holds keys of its own, {', '.join(_keys_beside([*where, '']))}; set one of them"
    return sentence(first, where)


def sentence(error: Any, where: Sequence[str]) -> str:
    """One of pydantic's errors as a sentence about a key."""
    given = f", not {_short.repr(error['input'])}" if where and not isinstance(error["input"], dict) else ""
    message = error["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list in brackets")
    return f"{'.'.join(where) or 'configuration'}: {message}{given}"


def _keys_of(place: Sequence[int | str]) -> list[str]:
    """The keys in the path of a pydantic error, without the names of union members."""
    keys: list[str] = []
    for part in place:
        if isinstance(part, int) or part in _keys_beside([*keys, part]):
            keys.append(str(part))
    return keys


def _keys_beside(where: Sequence[str]) -> list[str]:
    """The keys that are valid in place of a key."""
    models: list[Any] = [RunConfig]
    for field in where[:-1]:
        models = [kind for model in models for kind in _models_of(model, field)]
    return sorted({name for model in models for name in model.model_fields})


def _models_of(model: Any, field: str) -> list[Any]:
    if (model, field) == (RunConfig, "method"):
        return [methods.config_class(name) for name in methods.names()]
    if field not in model.model_fields:
        return []
    annotation = model.model_fields[field].annotation
    kinds = get_args(annotation) or (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
