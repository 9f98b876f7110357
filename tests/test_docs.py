"""What the documentation tells a reader to type: every command and option exists, every Python block runs or parses."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from distill import cli as distill_cli
from distill.config import load_config
from distill.experiments import read_variants
from service import cli as service_cli
from service.schemas import ImageRequest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
APPS = {"distill": distill_cli.app, "fgm-service": service_cli.app}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command of the page's shell blocks, and of the console commands named in its prose."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words
    for quoted in re.findall(
        r"`((?:distill|fgm-service|python benchmarks/\S+\.py) [^`]+)`", page.read_text(encoding="utf-8")
    ):
        yield shlex.split(re.sub(r"\s+", " ", quoted))


def without_metavariables(words: list[str]) -> list[str]:
    """A synopsis as a command: no brackets, no ellipsis."""
    return [word.strip("[]") for word in words if word.strip("[].")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    for words in commands(page):
        while "=" in words[0]:  # variables before a command
            words = words[1:]
        if words[0] == "accelerate":
            words = ["distill", *words[words.index("distill.cli") + 1 :]]
        if words[0] in APPS and "..." not in words[1]:
            options = [word for word in without_metavariables(words[1:]) if word != "--help"]
            found = CliRunner().invoke(APPS[words[0]], [*options, "--help"])
            assert found.exit_code == 0, (words, found.output)
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        elif words[0] == "python" and words[1].endswith(".py"):
            script = (ROOT / words[1]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in script for word in words[2:] if word.startswith("--")), words
        elif words[0] == "curl" and "--json" in words and words[1].endswith("/images/generations"):
            ImageRequest.model_validate(json.loads(words[words.index("--json") + 1]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_run_and_compared_is_a_configuration(page):
    for words in commands(page):
        if words[0] == "accelerate":
            words = ["distill", *words[words.index("distill.cli") + 1 :]]
        if words[:2] not in (["distill", "run"], ["distill", "compare"]) or len(words) == 2:  # a name in prose
            continue
        given = typer.main.get_command(distill_cli.app).commands[words[1]].make_context(words[1], words[2:]).params
        sets = given["overrides"] or []
        if words[1] == "run" and not given["config"].endswith(".yaml"):
            load_config(given["config"], sets)
        elif words[1] == "compare":
            ours = [text for text in given["variants"] if not text.endswith(".yaml")]
            variants = read_variants(ours, given["config"], sets, given["images"])
            assert len({str(variant.config) for variant in variants}) == len(variants), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_python(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def test_the_student_runs_in_stock_diffusers_as_the_readme_says(teacher_t5):
    (block,) = (block for block in blocks(ROOT / "README.md", "python") if "StableDiffusion3Pipeline" in block)
    here = block.replace("runs/sd3-medium-lora/student", str(teacher_t5))
    assert here != block
    names: dict[str, object] = {}
    exec(here, names)
