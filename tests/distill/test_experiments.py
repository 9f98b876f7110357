"""`distill compare`: the meaning of variants, equal budgets, no repeated runs, and the files that it writes."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from distill.cli import app
from distill.config import load_config
from distill.errors import ConfigError, DivergedError, RunError
from distill.experiments import ComparisonOptions, Cost, check_budget, evaluate_variants, share_caches
from distill.pipeline import SHIPPED_STUDENT
from distill.report.grid import GAP, TILE
from distill.training import checkpoint
from distill.training.speed import images_within, read_speed
from distill.variants import Variant, read_variants
from distill.worlds.scenes.eval_dataset import ScenesEvalDataset


def test_a_method_takes_all_else_from_the_base_and_the_teachers_guidance(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("method: {name: dmd, fake_steps: 2}\nimages: 7\n")
    texts = ["fgm", "fgm,method.alpha=0.5,optimizer.betas=[0.5,0.9]", "dmd", str(file)]
    variants = read_variants(texts, "scenes", ["batch=32", "optimizer.max_grad_norm=2"], 640)
    plain, ablated, dmd, mine = (variant.config for variant in variants)
    base = load_config("scenes")
    assert [variant.name for variant in variants] == [*texts[:3], "mine"]
    assert {config.images for config in (plain, ablated, dmd, mine)} == {640}
    assert {config.batch for config in (plain, ablated, dmd, mine)} == {32}
    assert {config.optimizer.max_grad_norm for config in (plain, ablated, dmd, mine)} == {2}
    assert plain.method == base.method
    assert ablated.method == base.method.model_copy(update={"alpha": 0.5})
    assert ablated.optimizer.betas == (0.5, 0.9)
    assert dmd.method.guidance == base.method.guidance
    assert dmd.method.fake_steps == 5  # the method's own, not the base's
    assert mine.method.fake_steps == 2
    (reflow,) = read_variants(["reflow"], "scenes", [], None)  # knows no fake, so no guidance of one
    assert reflow.config.method.guidance.scale == base.method.guidance.scale
    assert read_variants(["fgm"], "scenes", [], None)[0].config.images == base.images


def test_the_command_of_a_variant_makes_the_same_run_by_itself() -> None:
    texts = [
        "fgm,method.times={distribution: uniform}",
        "fgm,networks={kind: lora, rank: 8}",
        "dmd,method.guidance.scale=[2,6]",
    ]
    for variant in read_variants([*texts, "fgm,ema_half_life=900"], "scenes", ["batch=32"], 640):
        program, verb, source, *words, last, folder = shlex.split(variant.command(Path("runs")))
        assert (program, verb, set(words[::2])) == ("distill", "run", {"--set"})
        assert (last, folder) == ("--out", f"runs/{variant.name}")
        assert load_config(source, words[1::2]) == variant.config


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["fgn"], "no method 'fgn'; there are dmd, "),
        (["fgm", "fgm"], "two variants are named 'fgm'"),
        (["fgm", "dmd,teacher=elsewhere"], "teacher differs between variants"),
        (["fgm,method.alpah=1"], "did you mean 'alpha'"),
        (["fgm,method=dmd"], "fgm,method=dmd sets the method dmd; name that method as the variant"),
    ],
)
def test_variants_that_cannot_be_compared_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_variants(texts, "scenes", [], None)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na blue square\n")
    return path


def invoke(teacher: Path, prompts: Path, out: Path, *arguments: str, evaluator: str = "none") -> Result:
    values = (f"teacher={teacher}", f"prompts.source={prompts}", "batch=4", "method.fake_steps=1")
    values += (f"evaluation.evaluator={evaluator}", "evaluation.images=4")
    words = ["compare", *arguments, "--config", "scenes-debug", "--steps", "2", "--out", str(out)]
    return CliRunner().invoke(app, [*words, *(part for value in values for part in ("--set", value))])


def compare(teacher: Path, prompts: Path, out: Path, *arguments: str) -> dict:
    result = invoke(teacher, prompts, out, "fgm", "dmd", *arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads((out / "compare.json").read_text())


def test_runs_get_equal_images_share_embeddings_and_are_not_repeated(teacher, prompts, tmp_path) -> None:
    prompts = shutil.copy(prompts, tmp_path / "prompts.txt")
    found = compare(teacher, prompts, tmp_path, "--images", "8")
    assert {name: (run["images"], run["exported"]) for name, run in found["runs"].items()} == {
        "fgm": (8, 8),
        "dmd": (8, 8),
    }
    assert all(run["seconds"] > 0 for run in found["runs"].values())
    table = (tmp_path / "compare.md").read_text()
    assert "|  | fgm | dmd |" in table
    assert "| images | 8 | 8 |" in table
    assert found["command"] in table
    assert found["runs"]["dmd"]["command"] in table
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.height > 3 * 128  # the teacher's row and those of both students
    assert (tmp_path / "dmd" / "embeddings").samefile(tmp_path / "fgm" / "embeddings")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/student/onestep.json")}
    assert compare(teacher, prompts, tmp_path, "--images", "8") == found
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/student/onestep.json")}
    prompts.write_text("other prompts\nat the same place\n")
    refused = invoke(teacher, prompts, tmp_path, "fgm", "dmd", "--images", "8")
    assert "was made of other prompts than the source holds now" in str(refused.exception)


def test_runs_share_caches_of_the_same_sources(tmp_path) -> None:
    gan = ["method.name=dmd", "method.gan={}", "real.source=scenes", "real.max_count=4"]
    given = {"plain": [], "first": gan, "second": [*gan, "batch=8"], "more": [*gan, "real.max_count=5"]}
    variants = [Variant(name, load_config("scenes-debug", sets), "scenes-debug", ()) for name, sets in given.items()]
    for variant in variants:
        share_caches(variant, variants, tmp_path)
    assert all((tmp_path / name / "embeddings").samefile(tmp_path / "plain" / "embeddings") for name in given)
    assert (tmp_path / "second" / "images").samefile(tmp_path / "first" / "images")
    assert not any((tmp_path / name / "images").exists() for name in ("plain", "more"))


def test_a_run_that_diverges_is_a_column_that_says_so_and_the_others_go_on(teacher, prompts, tmp_path) -> None:
    wild = "fgm,optimizer.fake_lr=1e30,optimizer.warmup_images=0,optimizer.max_skipped_steps=0"
    done = invoke(teacher, prompts, tmp_path, wild, "fgm", "--images", "16")
    assert done.exit_code == 0, done.output + str(done.exception)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["runs"].keys() == {"fgm"}
    assert "lower optimizer." in found["diverged"][wild]
    assert (
        f"|  | fgm | {wild} |\n| --- | ---: | ---: |\n| images | 16 | diverged |"
        in (tmp_path / "compare.md").read_text()
    )
    alone = invoke(teacher, prompts, tmp_path, wild, "--images", "16")
    assert isinstance(alone.exception, DivergedError)


def test_a_run_that_cannot_start_is_a_column_with_the_reason_and_the_others_go_on(teacher, prompts, tmp_path) -> None:
    wrong = "fgm,sizes=[[17,16]]"
    (tmp_path / "dmd").write_text("a file where the run's folder should be")
    done = invoke(teacher, prompts, tmp_path, wrong, "fgm", "dmd", "--images", "4")
    assert done.exit_code == 0, done.output + str(done.exception)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["runs"].keys() == {"fgm"}  # which shares the prompts that the first did not encode
    assert found["failed"].keys() == {wrong, "dmd"}
    assert "cannot make images of 17x16" in found["failed"][wrong]
    table = (tmp_path / "compare.md").read_text()
    assert f"|  | fgm | {wrong} | dmd |\n| --- | ---: | ---: | ---: |\n| images | 4 | failed | failed |" in table
    alone = invoke(teacher, prompts, tmp_path, wrong, "--images", "4")
    assert isinstance(alone.exception, RunError)
    assert "cannot make images of 17x16" in str(alone.exception)


def test_a_run_that_went_beyond_the_budget_is_refused(tmp_path) -> None:
    config = load_config("scenes-debug", ["batch=4", "images=8"])
    folder = tmp_path / "fgm"
    checkpoint.save(folder / "checkpoints" / checkpoint.state_name(12), {}, {"images": 12})
    (folder / "config.yaml").write_text("teacher: scenes\nimages: 12\n")
    with pytest.raises(ConfigError, match="has seen 12 images, more than the budget of 8"):
        check_budget(Variant("fgm", config, "scenes-debug", ()), tmp_path)


def test_students_of_any_teacher_are_compared_with_its_images_in_one_table(teacher, prompts, tmp_path) -> None:
    variants = ["fgm", "fgm,method.alpha=0.5", "--images", "4", "--set", "sizes=[[24,16]]"]
    done = invoke(teacher, prompts, tmp_path, *variants, evaluator="reference")
    assert done.exit_code == 0, done.output + str(done.exception)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["teacher"]["relative_diversity"] == 1
    assert all({"kernel", "frechet", "grid", "saturation"} <= run.keys() for run in found["runs"].values())
    table = (tmp_path / "compare.md").read_text()
    assert "|  | teacher | fgm | fgm,method.alpha=0.5 |" in table
    assert "| relative_diversity | 1 |" in table
    assert f"to the teacher's images (2 steps, guidance 2.5), on features {found['features']}" in table
    shared = tmp_path / "fgm,method.alpha=0.5" / "references"
    assert shared.samefile(tmp_path / "fgm" / "references")
    assert len(list(shared.iterdir())) == 1  # both runs and the comparison take the same images
    with Image.open(tmp_path / "compare.png") as picture:
        pixels = np.asarray(picture)
    for row in range(3):  # the teacher's images and those of both students are as wide as the run's, with margins
        tiles = pixels[GAP + row * (TILE + GAP) :][:TILE, -TILE - GAP :]
        assert (tiles[:20] == 255).all()
        assert (tiles[25:100, 5:TILE] < 255).any(axis=-1).mean() > 0.9


def test_seconds_become_whole_batches() -> None:
    assert [images_within(seconds, 10.0, 8) for seconds in (0.1, 2.5, 60)] == [8, 24, 600]


@pytest.mark.parametrize("text", ["garbage", "{}", '{"images_per_second": -1}', '{"images_per_second": NaN}', "[]"])
def test_a_speed_that_is_none_is_named(text, tmp_path) -> None:
    (tmp_path / "speed.json").write_text(text)
    with pytest.raises(RunError, match=r"speed\.json holds no speed; remove it"):
        read_speed(tmp_path)


def test_equal_seconds_are_as_many_images_as_each_run_makes_in_them(teacher, prompts, tmp_path) -> None:
    """The speeds are given; test_run.py measures one."""
    for name, speed in (("fgm", 5.0), ("dmd", 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "speed.json").write_text(json.dumps({"images_per_second": speed}))
    found = compare(teacher, prompts, tmp_path, "--seconds", "2")
    assert {name: run["images"] for name, run in found["runs"].items()} == {"fgm": 8, "dmd": 4}


def test_students_of_the_toy_dataset_are_evaluated_in_one_table(tmp_path) -> None:
    variants = read_variants(["fgm", "dmd"], "scenes", ["batch=8"], 8)
    for variant in variants:
        folder = tmp_path / variant.name
        checkpoint.save(
            folder / "checkpoints" / checkpoint.state_name(8), {"x": torch.zeros(1)}, {"images": 8, "seconds": 2.0}
        )
        (folder / "student").symlink_to(SHIPPED_STUDENT)
    counts: list[int] = []
    outcome = evaluate_variants(variants, tmp_path, ComparisonOptions(1, 1, 0), torch.device("cpu"), counts.append)
    assert sum(counts) == 3 * ScenesEvalDataset().prompts(1, 0).count
    first, second = (outcome.measured.metrics[name] for name in ("fgm", "dmd"))
    assert first["frechet"] == second["frechet"]  # the same student on the same prompts
    header, lines = outcome.table()
    assert header == ["", "teacher", "fgm", "dmd"]
    assert [line[0] for line in lines[:4]] == ["images", "seconds", "exported", "overall"]
    assert lines[0] == ["images", "-", "8", "8"]
    assert all(len(line) == len(header) for line in lines)
    assert outcome.costs["fgm"] == Cost(
        8, 2.0, json.loads((SHIPPED_STUDENT / "onestep.json").read_text())["images_seen"]
    )
    outcome.save(tmp_path, {"command": "distill compare fgm dmd"})
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["teacher"].keys() <= found["runs"]["fgm"].keys()
    assert np.asarray(outcome.picture).ndim == 3
