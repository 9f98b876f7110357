"""The two packages meet in few files, and no heavy library is imported before it is needed."""

import ast
import os
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


def test_the_service_imports_the_pipeline_and_its_tuning_in_one_file_and_each_light_module_in_another() -> None:
    assert importers("service", "distill.pipeline") == {"service/engine/model_loader.py"}
    assert importers("service", "distill.student") == {"service/engine/model_loader.py"}
    assert importers("service", "distill.options") == {"service/settings.py"}
    assert importers("service", "distill.presets") == {"service/jobs/fine_tuning/choices.py"}
    assert importers("service", "distill.methods") == {"service/jobs/fine_tuning/choices.py"}
    assert importers("service", "distill.config") == {"service/jobs/fine_tuning/choices.py"}
    names = {name for file, name in imports("service") if name.startswith("distill")}
    light = ("distill.options.", "distill.presets", "distill.methods", "distill.config.", "distill.errors.")
    assert all(name.startswith(("distill.pipeline.", "distill.student.tuning.", *light)) for name in names)


def test_peft_and_accelerate_have_their_places() -> None:
    assert importers("distill", "peft") == {"distill/training/networks.py"}
    glue = {"diffusers", "transformers", "accelerate", "peft"}
    assert all("distill/flow.py" not in importers("distill", library) for library in glue)


def test_batching_policy_needs_neither_torch_nor_asyncio() -> None:
    assert "service/engine/batcher.py" not in importers("service", "torch") | importers("service", "asyncio")


def test_the_server_imports_no_torch_and_only_light_modules_of_the_distilling_half() -> None:
    code = "import sys, service.app, service.cli; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = set(ended.stdout.split())
    assert not {"torch", "diffusers"} & loaded
    light = {"distill", "distill.options", "distill.presets", "distill.methods"}
    assert {name for name in loaded if name.partition(".")[0] == "distill"} == light


COMMANDS = """
import socket, sys
from distill import cli as distill
from service import cli as service

taken = socket.create_server(("127.0.0.1", 0))
refused = [
    "run scenes-debug --set imges=8", "run scenes-debug --set method=fgn", "run scenes-debug --set evaluation.images=1",
    "run scenes-debug --set teacher=nowhere", "run scenes-debug --set prompts.source=nowhere.txt",
    "run scenes-debug --set evaluation.evaluator=nothing", "run scenes-debug --set init_from=nowhere",
    "run scenes-debug --name -mine", "run scenes-debug --out distill", "run nothing",
    "generate", "generate x --student nowhere", "generate x --teacher nowhere", "generate --file nowhere.txt",
    "evaluate --student nowhere", "evaluate --teacher nowhere", "evaluate --picture README.md",
    "geneval README.md --out nowhere", "score nowhere", "score nowhere --clip nowhere",
    "decoder nowhere", "decoder README.md", "decoder distill",
    "decoder scenes --prompts nowhere.txt", "decoder scenes --images-from nowhere", "evaluate --decoder nowhere",
    "generate x --decoder nowhere", "generate x --grid README.md", "generate x --teacher README.md",
    "compare fgm fgn", "compare fgm --set teacher=nowhere",
    "export nowhere", "report nowhere", "plan nowhere", "plan --device abacus", "embed nowhere x --out nowhere",
    "embed scenes nowhere.txt --out nowhere", "encode scenes nowhere --out nowhere", "jobs --url http://127.0.0.1:1",
]
commands = [(distill, words, 2) for words in refused]
commands += [(distill, words, 0) for words in ("--help", "run --help", "plan --help", "--version")]
commands += [(service, words, 0) for words in ("--help", "serve --help", "--version")]
commands += [
    (service, f"serve {words}", 2)
    for words in (
        "--model nowhere", "--model -mine=distill", "--set http.prt=1", f"--port {taken.getsockname()[1]}",
        "--keys-file README.md", "--host 0.0.0.0", "--devices abacus", "--port 0 --data README.md",
        "--port 0 --set runtime.decoder=nowhere", "--port 0 --set engine.profiles_folder=README.md",
    )
]
for command, words, status in commands:
    sys.argv = ["command", *words.split()]
    try:
        command.main()
    except SystemExit as ended:
        assert ended.code == status, (words, ended.code)
    heavy = {"torch", "numpy", "diffusers", "transformers", "accelerate", "fastapi"} & sys.modules.keys()
    assert not heavy, (words, heavy)
"""


def test_neither_help_nor_a_refusal_imports_what_takes_seconds(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "README.md").write_text("not ours")
    (tmp_path / "distill" / "student").mkdir(parents=True)
    (tmp_path / "distill" / "student" / "other.txt").write_text("not ours")
    ended = subprocess.run(
        [sys.executable, "-c", COMMANDS], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "distill"}  # nothing is made


ABOVE_MODELS = (
    "config",
    "data",
    "decoder",
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
        (
            "distill/data",
            ("decoder", "evaluate", "training", "student", "report", "plan", "worlds", "run", "pipeline", "cli"),
        ),
        ("distill/evaluate", ("decoder", "training", "worlds", "run", "cli")),
        ("distill/report", ("decoder", "evaluate", "worlds", "run", "cli")),
        ("distill/training", ("decoder", "worlds", "cli")),
        ("distill/student", ("decoder", "worlds", "cli")),
        ("distill/decoder", ("worlds", "run", "cli")),
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
