"""Configurations: presets load, overrides apply, and every mistake is named."""

import pytest

from distill.config import PRESETS, Lora, load_config
from distill.errors import ConfigError


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_are_valid_and_survive_a_round_trip(preset, tmp_path):
    import yaml

    config = load_config(preset)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(config.as_dict()))
    assert load_config(str(path)) == config


def test_overrides_reach_nested_keys():
    config = load_config(
        "scenes",
        ["optimizer.student_rate=1e-5", "method.alpha=0.5", "images=640", "networks.kind=lora", "networks.rank=8"],
    )
    assert config.optimizer.student_rate == 1e-5
    assert config.method.alpha == 0.5
    assert config.images == 640
    assert config.networks == Lora(rank=8)


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("scenes", "optimzer.clip=1", ["optimzer", "did you mean 'optimizer'"]),
        ("scenes", "method.alfa=1", ["method.alfa", "did you mean 'alpha'"]),
        ("scenes", "method.guidance.techer=1", ["method.guidance.techer", "did you mean 'teacher'"]),
        ("scenes", "networks.checkpoint=1", ["'networks.checkpoint'", "did you mean 'checkpointing'"]),
        ("scenes-debug", "networks.attention=math", ["networks.kind is missing", "full or lora"]),
        ("scenes", "networks.kind=lo", ["networks", "lora"]),
        ("scenes", "optimizer.kind=lion", ["optimizer.kind", "adam-8bit"]),
        ("scenes", "sizes=[[64]]", ["sizes"]),
        ("scenes", "networks.attention=flesh", ["networks.attention", "flash"]),
        ("scenes", "batch=many", ["batch", "many"]),
        ("scenes", "images=0", ["images"]),
        ("scenes", "method.name=fmg", ["fmg", "fgm"]),
        ("scenes", "method.weight=none", ["method.weight", "inverse-l1"]),
        ("scenes", "batch", ["key=value"]),
        ("scenes", "micro_batch=7", ["micro_batch", "divide"]),
        ("scens", "batch=1", ["scens", "did you mean 'scenes'"]),
        ("missing.yaml", "batch=1", ["missing.yaml"]),
    ],
)
def test_mistakes_are_named(name, override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(name, [override])
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("kernel", ["flash", "xformers"])
def test_kernels_without_a_forward_derivative_are_refused_where_one_is_taken(kernel):
    own = ["method={name: flow_map}", "networks.kind=full"]
    with pytest.raises(ConfigError, match=f"attention {kernel} has no forward-mode derivative, which flow_map takes"):
        load_config("scenes", [*own, f"networks.attention={kernel}"])
    assert load_config("scenes", [*own, "networks.attention=math"]).networks.attention == "math"


def test_broken_files_are_named(tmp_path):
    for text in ("a: [", "- 1\n- 2\n"):
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"broken\.yaml"):
            load_config(str(path))


def test_a_budget_of_less_than_a_step_is_refused():
    with pytest.raises(ConfigError, match="images 511 is less than a batch of 512"):
        load_config("scenes", ["images=511"])


def test_identity_holds_everything_but_budget_and_cadence():
    base = load_config("scenes")
    assert load_config("scenes", ["images=777", "cadence.log=3"]).identity() == base.identity()
    assert load_config("scenes", ["networks.compile=true", "networks.attention=math"]).identity() == base.identity()
    assert load_config("scenes", ["sizes=[[64,64]]"]).identity() != base.identity()
    assert load_config("scenes", ["seed=7"]).identity() != base.identity()
    assert load_config("scenes", ["method.alpha=0.7"]).identity() != base.identity()
