"""The halves meet in one file, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@cache
def imports(package: str) -> list[tuple[str, str]]:
    """(file, imported module) of every import in a package, at the top of a file or inside a function."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(file, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                found += [(file, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def importers(package: str, module: str) -> set[str]:
    """The files of a package that import a module or something from it."""
    return {file for file, name in imports(package) if f"{name}.".startswith(f"{module}.")}


def test_distillation_never_imports_the_service() -> None:
    assert importers("distill", "service") == set()


def test_the_service_imports_the_pipeline_in_one_file_and_its_options_in_another() -> None:
    assert importers("service", "distill.pipeline") == {"service/engine/model_loader.py"}
    assert importers("service", "distill.options") == {"service/settings.py"}
    names = {name for file, name in imports("service") if name.startswith("distill")}
    assert all(name.startswith(("distill.pipeline.", "distill.options.")) for name in names)


def test_peft_and_accelerate_have_their_places() -> None:
    assert importers("distill", "peft") == {"distill/training/networks.py"}
    glue = {"diffusers", "transformers", "accelerate", "peft"}
    assert all("distill/flow.py" not in importers("distill", library) for library in glue)


def test_batching_policy_needs_neither_torch_nor_asyncio() -> None:
    assert "service/engine/batcher.py" not in importers("service", "torch") | importers("service", "asyncio")


def test_the_server_imports_no_torch_and_only_the_options_of_the_distilling_half() -> None:
    code = "import sys, service.app, service.cli; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = set(ended.stdout.split())
    assert not {"torch", "diffusers"} & loaded
    assert {name for name in loaded if name.partition(".")[0] == "distill"} == {"distill", "distill.options"}


HELP = """
import sys
from distill.cli import app as distill
from service.cli import app as service

for app, *words in (distill,), (distill, "run"), (service, "serve"):
    app([*words, "--help"], standalone_mode=False)
    assert "torch" not in sys.modules, words
"""


def test_help_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, check=True, capture_output=True)


ABOVE_MODELS = (
    "config",
    "data",
    "training",
    "student",
    "evaluate",
    "report",
    "plan",
    "worlds",
    "run",
    "pipeline",
    "cli",
)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("distill/models", ("methods", *ABOVE_MODELS)),
        ("distill/methods", ABOVE_MODELS),
        ("distill/data", ("training", "student", "report", "plan", "worlds", "run", "cli")),
        ("distill/evaluate", ("training", "worlds", "run", "cli")),
        ("distill/report", ("evaluate", "worlds", "run", "cli")),
        ("distill/training", ("worlds", "cli")),
        ("distill/student", ("worlds", "cli")),
        ("distill/plan", ("worlds", "cli")),
        ("distill/worlds", ("run", "cli")),
        ("service/engine", ("http", "images", "jobs", "routers", "ray", "app")),
        ("service/observability", ("http", "images", "jobs", "routers", "ray", "app")),
        ("service/images", ("jobs", "routers", "ray", "app")),
        ("service/jobs", ("routers", "ray", "app")),
        ("service/http", ("routers", "ray", "app")),
    ],
)
def test_a_package_imports_nothing_above_it(package: str, forbidden: tuple[str, ...]) -> None:
    root = package.partition("/")[0]
    files = {file for module in forbidden for file in importers(package, f"{root}.{module}")}
    assert files == set()


def test_only_the_app_imports_routers_and_nobody_imports_commands() -> None:
    outside = {file for file in importers("service", "service.routers") if not file.startswith("service/routers/")}
    assert outside == {"service/app.py"}
    assert {file for file in importers("distill", "distill.cli") if not file.startswith("distill/cli/")} == set()
