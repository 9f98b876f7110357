"""The reader of configurations: presets and YAML files, with `key=value` overrides."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from yaml.composer import ComposerError

from distill import methods, presets
from distill.config.explanations import explain, nearest, sentence
from distill.config.run_config import NetworkSettings, RunConfig
from distill.config_group import ConfigGroup
from distill.errors import ConfigError

_Group = TypeVar("_Group", bound=ConfigGroup)
_KINDS = {"method": "name", "networks": "kind"}  # groups with several kinds, and the key that names the kind


class _Loader(yaml.SafeLoader):
    """Reads YAML, but refuses a key that is set twice; PyYAML takes the last value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ComposerError(None, None, f"{key.value!r} is set twice", key.start_mark)
                seen.add(key.value)
        return node


def _read_yaml(text: str) -> Any:
    """Read a document of YAML; None for an empty one. Raises YAMLError and RecursionError."""
    return yaml.load(text, _Loader)


def is_preset(name: str) -> bool:
    """Whether `load_config` takes the name: a preset, or a YAML file."""
    return name.endswith((".yaml", ".yml")) or name in presets.names()


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a preset or YAML file, with `a.b=value` overrides. Raises ConfigError naming the preset, file or key."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else presets.FOLDER / f"{name}.yaml"
    if not path.exists():
        known = presets.names()
        if Path(name).is_file():
            raise ConfigError(f"{name} is not named as YAML; let its name end in .yaml, or give a preset")
        raise ConfigError(f"no preset or file {name!r}{nearest(name, known)}; presets are {', '.join(known)}")
    try:
        values = _read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a preset or a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {_fault(error)}; correct it there") from error
    if values is None:
        raise ConfigError(f"{path} holds no keys; write them like those of the presets")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(values).__name__}; write it like the presets")
    return make_config(values, overrides)


def make_config(values: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Make a configuration of plain values, which `a.b=value` overrides change. Raises ConfigError naming the key."""
    for group, tag in _KINDS.items():
        if isinstance(values.get(group), str):
            values[group] = {tag: values[group]}
    _apply(values, overrides)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def _fault(error: Exception) -> str:
    """What is wrong with a text of YAML, with its line, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"  # type: ignore[attr-defined]


def read_group(kind: type[_Group], overrides: Sequence[str]) -> _Group:
    """Read a group of settings from `key=value` overrides of its defaults. Raises ConfigError naming the key."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, value = parse_override(override)
        _put(values, key.split("."), value, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "[key]"]
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"unknown key {where[-1]!r}{nearest(where[-1], list(kind.model_fields))}") from error
        raise ConfigError(sentence(first, where)) from error


def parse_override(override: str) -> tuple[str, Any]:
    """Read `key=value`, where the value is YAML. Raises ConfigError for anything else."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write it as key=value, for example --set optimizer.student_lr=1e-4")
    try:
        value = text if text in ("", "-") else _read_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"--set {override}: the value is not YAML ({_fault(error)}); put quotes around a text"
        ) from None
    if isinstance(value, str) and value == text.strip():  # YAML 1.1 reads 1e-4 as a string
        with suppress(ValueError):
            return key, float(value)
    return key, value


def _apply(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set each key to its last value. Kinds are set first, so keys of a kind may be given before it."""
    given: dict[str, tuple[Any, str]] = {}
    for override in overrides:
        key, value = parse_override(override)
        if key in _KINDS and isinstance(value, str):  # method=dmd is short for method.name=dmd
            key = f"{key}.{_KINDS[key]}"
        given.pop(key, None)
        given[key] = value, override
    tags = {f"{group}.{tag}": group for group, tag in _KINDS.items()}
    for key in sorted(given, key=lambda key: key not in _KINDS and key not in tags):
        value, override = given[key]
        if key in tags:
            _choose(values, tags[key], value)
        _put(values, key.split("."), value, override)


def _choose(values: dict[str, Any], group: str, kind: Any) -> None:
    """Drop the settings of another kind from a group, except those that both kinds share.

    The shared settings are the guidance of methods, which belongs to the teacher, and how networks compute. Raises
    ConfigError for a method that does not exist.
    """
    own = values.get(group)
    if not isinstance(own, dict):
        return
    if group == "networks":
        if own.get("kind", "full") != kind:
            values[group] = {name: value for name, value in own.items() if name in NetworkSettings.model_fields}
        return
    if kind not in methods.names():
        near = nearest(str(kind), methods.names())
        raise ConfigError(f"no method {kind!r}{near}; there are {', '.join(methods.names())}")
    if own.get("name", presets.METHOD) != kind:
        guidance = own.get("guidance")
        if isinstance(guidance, dict):  # a method without a fake has no guidance of one
            known = methods.config_class(kind).model_fields["guidance"].annotation.model_fields
            guidance = {name: value for name, value in guidance.items() if name in known}
        values[group] = {} if guidance is None else {"guidance": guidance}


def _put(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {key!r} has no keys of its own; set its value")
    values[keys[-1]] = value
