"""Settings with which replicas cannot start give one sentence, before Ray is imported."""

import importlib.util
import re
import sys

import pytest

from service import cli

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")


@pytest.mark.parametrize(
    ("words", "settings", "named"),
    [
        ([], {"engine__devices": "cuda:0,cuda:1"}, "cuda:0,cuda:1"),
        ([], {"jobs__devices": "cuda:1"}, "jobs.devices"),
        ([], {"http__host": "0.0.0.0"}, "--open-to-all"),
        (["--address", "auto"], {}, "images.artifacts"),
    ],
)
def test_unsuitable_settings_are_named(words, settings, named, monkeypatch, capsys):
    for name, value in settings.items():
        monkeypatch.setenv(f"SERVICE_{name.upper()}", value)
    monkeypatch.setattr(sys, "argv", ["fgm-service", "ray", *words])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert re.fullmatch(r"error: .*\n", printed := capsys.readouterr().err)
    assert named in printed
