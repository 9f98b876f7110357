"""The structure of the tree: names are unique, classes and folders are small, and tests mirror the code."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST_CLASS = 300  # lines
MOST_MODULES = 12  # on top of a package
# Tests of the whole package, of files that are no module, and of what several modules do together.
WHOLE = {
    "distill/cli/test_cli.py",
    "distill/test_presets.py",
    "distill/training/test_distributed.py",
    "distill/worlds/scenes/test_scenes.py",
    "service/test_client.py",
    "service/test_failures.py",
    "service/test_student.py",
    "service/routers/test_openapi.py",
    "service/routers/test_refusals.py",
    "service/web/test_browser.py",
}


def classes() -> list[tuple[str, ast.ClassDef]]:
    files = [path for package in ("distill", "service") for path in (ROOT / package).rglob("*.py")]
    trees = [(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))) for path in files]
    return [(file, node) for file, tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_no_public_class_name_stands_twice() -> None:
    names = Counter(node.name for _, node in classes() if not node.name.startswith("_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_class_is_long() -> None:
    lengths = {f"{file} {node.name}": (node.end_lineno or 0) - node.lineno for file, node in classes()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_CLASS} == {}


@pytest.mark.parametrize("package", ["distill", "service"])
def test_the_top_of_a_package_is_small(package: str) -> None:
    assert len(list((ROOT / package).glob("[!_]*.py"))) <= MOST_MODULES


@pytest.mark.parametrize("package", ["distill", "service"])
def test_tests_mirror_the_files_that_they_test(package: str) -> None:
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests" / package).rglob("test_*.py")}
    modules = {path.with_name(path.name.removeprefix("test_")) for path in tests - {Path(name) for name in WHOLE}}
    assert {str(module) for module in modules if not (ROOT / module).is_file()} == set()
