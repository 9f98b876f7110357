"""The documentation is correct: commands, options, paths and links exist, and the README's blocks run."""

import ast
import builtins
import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, dropwhile
from pathlib import Path

import click
import httpx
import pytest
import typer
import yaml
from cards import run_card
from commands import invoke, until
from PIL import Image
from tiny import undistilled
from typer.testing import CliRunner

from distill import cli as distill_cli
from distill import methods
from distill.config import RunConfig, load_config, make_config, parse_override
from distill.config.run_config import flat
from distill.methods.dmd import Gan
from distill.methods.policies import Guidance, Times
from distill.variants import read_variants
from service import cli as service_cli
from service.jobs.fine_tuning.options import DistillationOptions
from service.schemas import ImageRequest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
APPS = {"distill": distill_cli.app, "fgm-service": service_cli.app}
TEACHER = "stabilityai/stable-diffusion-3.5-medium"
NOT_RUN = {
    "python3": "the suite has its environment",
    ".": "the suite has its environment",
    "pip": "the suite needs no network: its environment has the package installed",
    "hf": "the suite needs no network and no account",
}
ELSEWHERE = {"docker/full.env", "evaluation/evaluate_images.py"}  # made by the reader; part of GenEval

# What this project once called things that have a name in the field; docs/glossary.md has the names.
HOUSE_WORDS = re.compile(
    r"\b(?:small worlds?|compan(?:y|ies)|judg(?:e[sd]?|ing|e?ments?)|images seen|lone|told of|whoever|yardstick"
    r"|is away|what came of it|wish(?:es)?|seats?|rungs?|leash)\b",
    re.IGNORECASE,
)

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def block_commands(page: Path) -> Iterator[list[str]]:
    """Words of each command of the page's shell blocks."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command of the page's shell blocks, and of the console commands named in its prose."""
    yield from block_commands(page)
    for quoted in re.findall(
        r"`((?:distill|fgm-service|python benchmarks/\S+\.py) [^`]+)`", page.read_text(encoding="utf-8")
    ):
        yield shlex.split(re.sub(r"\s+", " ", quoted))


def without_metavariables(words: list[str]) -> list[str]:
    """A synopsis as a command: no brackets, no ellipsis."""
    return [word.strip("[]") for word in words if word.strip("[].")]


@by_page
def test_commands_and_their_options_exist(page):
    for words in commands(page):
        words = [*dropwhile(lambda word: "=" in word, words)]  # variables, with a command or without
        if not words:
            continue
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


@by_page
def test_what_is_run_and_compared_is_a_configuration(page):
    for words in commands(page):
        if words[0] == "accelerate":
            words = ["distill", *words[words.index("distill.cli") + 1 :]]
        if words[0] != "distill" or words[1] not in ("run", "compare", "submit") or len(words) == 2:  # a name in prose
            continue
        given = typer.main.get_command(distill_cli.app).commands[words[1]].make_context(words[1], words[2:]).params
        sets = given["overrides"] or []
        if words[1] == "submit":
            fields = dict(parse_override(text) for text in sets)
            load_config(given["preset"] or given["teacher"], DistillationOptions(**fields).overrides())
        elif words[1] == "run" and not given["config"].endswith(".yaml"):
            load_config(given["config"], sets)
        elif words[1] == "compare":
            ours = [text for text in given["variants"] if not text.endswith(".yaml")]
            variants = read_variants(ours, given["config"], sets, given["images"])
            assert len({str(variant.config) for variant in variants}) == len(variants), words


@by_page
def test_python_is_python_and_defines_its_variables(page):
    for block in blocks(page, "python"):
        tree = ast.parse(block, str(page))
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        defined = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
        defined |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                defined |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
        assert {node.id for node in names} - defined == set(), block


@by_page
def test_variables_of_the_shell_are_set_or_explained(page):
    text = page.read_text(encoding="utf-8")
    for block in blocks(page, "sh"):
        for name in set(re.findall(r"\$\{?([A-Za-z_]\w*)", block)) - {"PWD"}:
            assert re.search(rf"\b{name}=|\bfor {name} in\b|`{name}`", text), name


@by_page
def test_toml_and_json_can_be_read(page):
    for block in blocks(page, "toml"):
        tomllib.loads(block)
    for block in blocks(page, "json"):
        for line in block.splitlines() if block.count("\n{") else [block]:
            json.loads(line)


def test_the_defaults_of_a_run_are_those_of_the_code():
    (block,) = blocks(ROOT / "docs" / "distill.md", "yaml")
    defaults = RunConfig().as_dict()
    del defaults["method"]
    assert make_config(yaml.safe_load(block)) == RunConfig()
    assert dict(flat(yaml.safe_load(block))).keys() == dict(flat(defaults)).keys()


def test_the_defaults_of_methods_are_those_of_the_code():
    """Each table of settings has all of them, with their defaults."""
    shared = {**Times().model_dump(mode="json"), **Guidance().model_dump(mode="json")}
    own = {name: methods.config_class(name)().model_dump(mode="json") for name in methods.names()}
    named: dict[str, set[str]] = {}
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        known = own.get(title, shared)
        if title == "dmd":
            known |= {f"gan.{name}": value for name, value in Gan().model_dump().items()}
        for table in re.findall(r"^\| setting \| default .*\n\|---.*\n((?:\|.*\n)+)", section, re.MULTILINE):
            for row in table.splitlines():
                names, defaults = row.strip("| ").split(" | ")[:2]
                values = yaml.safe_load("[" + defaults.replace("`", "") + "]")
                for name, value in zip(re.findall(r"`(.+?)`", names), values, strict=True):
                    assert value == known[name], (title, name)
                    named.setdefault(title, set()).add(name)
    assert named["Settings that methods share"] == shared.keys()
    for name, settings in own.items():
        assert settings.keys() - {"name", "times", "guidance", "realuid", "gan"} <= named[name], name


def test_every_block_of_the_readme_is_run_here():
    languages = re.findall(r"^```(\w*)\n.*?^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert set(languages) == {"sh", "python"}
    assert len(blocks(README, "python")) == 1


def test_the_python_block_of_the_readme_runs(teacher_t5, tmp_path, monkeypatch):
    """It runs unchanged with a student of fp16 files, but without a GPU."""
    undistilled(teacher_t5, tmp_path / "runs" / "sd3.5-medium-lora" / "student")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(README, "python")
    here = block.replace('"cuda", torch.bfloat16', "torch.float32")
    assert here != block
    exec(here, {})
    with Image.open("circle.png") as image:
        assert image.size == (16, 16)


def test_the_examples_of_the_shipped_students_cards_run():
    student = ROOT / "distill" / "worlds" / "scenes" / "weights" / "student"
    ours, stock = run_card(student)
    (decoder,) = run_card(student / "decoder")
    assert type(decoder["pipeline"].vae).__name__ == "AutoencoderTiny"
    assert ours["images"].shape == (1, 64, 64, 3)
    assert stock["image"].size == (64, 64)


def test_the_shell_blocks_of_the_readme_run(teacher, tmp_path, monkeypatch):
    """They run in order, with a tiny teacher, batches and evaluations of two images, and a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    smaller = [
        f"teacher={teacher}",
        "batch=2",
        "micro_batch=1",
        "images=4",
        "precision=fp32",
        "networks.rank=2",
        "networks.alpha=2",
        "sizes=[]",
        "method.guidance.skip_layers=[]",
        "evaluation.images=2",
        "evaluation.teacher_steps=2",
    ]
    with ExitStack() as servers:
        for words in block_commands(README):
            words = [word.replace(TEACHER, str(teacher)).replace(":8000", f":{port}") for word in words]
            if words[0] == "fgm-service":
                servers.close()  # one at a time
                servers.enter_context(serving(*words[1:], port=port))
            elif words[0] == "curl":
                subprocess.run(["curl", "--fail", "--silent", *words[1:]], check=True)
            elif words[0] == "distill":
                more = [f"--set={each}" for each in smaller] if words[1] in ("plan", "run") else []
                result = invoke(*words[1:], *more)
                assert result.exit_code == 0, (words, result.output)
            else:
                assert words[0] in NOT_RUN
    with Image.open("shapes.png") as image:
        assert image.size == (64, 64)
    assert Path("stars.png").exists()
    assert Path("runs/sd3.5-medium-lora/report.html").exists()


@contextmanager
def serving(*words: str, port: int) -> Iterator[None]:
    """Run `fgm-service` with these words until the end of the block; SIGTERM must end it with status 0."""

    def ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz").is_success
        except httpx.TransportError:
            return False

    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([sys.executable, "-m", "service.cli", *words, "--port", str(port)], stderr=log)
        try:
            until(server, ready)
            yield
        finally:
            server.terminate()
            assert server.wait(60) == 0
        log.seek(0)
        lines = [json.loads(line) for line in log]  # nothing of a library is between them
    messages = [line["message"] for line in lines if line["logger"] == "service"]
    name = messages[0].removeprefix("loading ").removesuffix(" on cpu")
    assert f"serving {name} on cpu at http://127.0.0.1:{port}; no API key is required" in messages
    assert {line["level"] for line in lines} == {"info"}


@by_page
def test_every_path_that_is_named_exists(page):
    """Paths are relative to the root or, for Python files, to one of the packages."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"(?<![\w./:-])(?:distill|service|tests|benchmarks|configs|deploy|docs|docker)/[\w./*-]*[\w*]", text
    )
    python = re.findall(r"(?<![\w./:-])(?:\w+/)+\w+\.py", text)
    found = {path for path in named if any(ROOT.glob(path))}
    found |= {path for path in python if any((ROOT / root / path).exists() for root in ("", "distill", "service"))}
    assert {*named, *python} - found - ELSEWHERE == set()


def templates() -> Iterator[str]:
    """Every string of the sources, with `…` for what an f-string or a % inserts."""
    for path in chain((ROOT / "distill").rglob("*.py"), (ROOT / "service").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_of_the_troubleshooting_page_are_printed_by_the_product():
    sources = [re.sub(r"\s+", " ", template) for template in templates()]
    for block in blocks(ROOT / "docs" / "troubleshooting.md", "text"):
        for message in block.splitlines():
            parts = [re.escape(part) for part in re.split(r"…", message) if part.strip("; ,()")]
            pattern = re.compile(".*".join(parts))
            assert any(pattern.search(source) for source in sources), message


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if not path.startswith("http"):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def helps(command: click.Command, *names: str) -> Iterator[tuple[str, str]]:
    """(words, help) of a command, its options and the commands below it."""
    for parameter in command.params:
        yield " ".join(names), getattr(parameter, "help", None) or ""
    yield " ".join(names), command.help or ""
    for name, below in getattr(command, "commands", {}).items():
        yield from helps(below, *names, name)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_pages_use_the_terms_of_the_field(page):
    """The changelog may have old names."""
    assert HOUSE_WORDS.findall(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", APPS)
def test_help_uses_the_terms_of_the_field(name):
    command = typer.main.get_command(APPS[name])
    found = {words: terms for words, text in helps(command, name) if (terms := HOUSE_WORDS.findall(text))}
    assert found == {}
