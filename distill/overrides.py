"""`--set key=value`, read alike by every command. No torch."""

from typing import Any

import yaml

from distill.errors import ConfigError


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value, which is YAML. Raises ConfigError for what is neither."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write it as key=value, for example --set optimizer.student_lr=1e-4")
    try:
        value = text if text in ("", "-") else yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"--set {override}: the value is not YAML; put quotes round a text") from None
    if isinstance(value, str) and value == text.strip():  # YAML 1.1 reads 1e-4 as a string
        try:
            return key, float(value)
        except ValueError:
            return key, value
    return key, value
