"""Configurations: presets load, overrides apply, and every mistake is named."""

import pytest

from distill import presets
from distill.config import Full, Lora, load_config
from distill.errors import ConfigError


@pytest.mark.parametrize("preset", presets.names())
def test_presets_are_valid_and_survive_a_round_trip(preset, tmp_path):
    import yaml

    config = load_config(preset)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(config.as_dict()))
    assert load_config(str(path)) == config


def test_overrides_reach_nested_keys():
    config = load_config(
        "scenes",
        ["optimizer.student_lr=1e-5", "method.alpha=0.5", "images=640", "networks.kind=lora", "networks.rank=8"],
    )
    assert config.optimizer.student_lr == 1e-5
    assert config.method.alpha == 0.5
    assert config.images == 640
    assert config.networks == Lora(rank=8)
    assert load_config("scenes", ["prompts.source=-"]).prompts.source == "-"  # YAML reads a list in it
    assert load_config("scenes", ['prompts.column="2024"']).prompts.column == "2024"


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("scenes", "optimzer.max_grad_norm=1", ["optimzer", "did you mean 'optimizer'"]),
        ("scenes", "method.alfa=1", ["method.alfa", "did you mean 'alpha'"]),
        ("scenes", "method.guidance.scal=1", ["method.guidance.scal", "did you mean 'scale'"]),
        ("scenes", "networks.checkpoint=1", ["'networks.checkpoint'", "did you mean 'gradient_checkpointing'"]),
        ("scenes-debug", "networks.attention=math", ["networks.kind is missing", "full or lora"]),
        ("scenes", "networks.kind=lo", ["networks", "lora"]),
        ("scenes", "optimizer.kind=lion", ["optimizer.kind", "adam-8bit"]),
        ("scenes", "sizes=[[64]]", ["sizes"]),
        ("scenes", "networks.attention=flesh", ["networks.attention", "flash"]),
        ("scenes", "batch=many", ["batch", "many"]),
        ("scenes", "images=0", ["images"]),
        ("scenes", "method.name=fmg", ["fmg", "fgm"]),
        ("scenes", "method.weight=none", ["method.weight", "inverse-l1"]),
        ("scenes", "method=fmg", ["no method 'fmg'", "did you mean 'fgm'"]),
        ("scenes", "method=null", ["method", "its settings"]),
        ("scenes", "method.gan={fake: 1}", ["method.gan belongs to another kind of method"]),
        ("scenes", "networks.rank=8", ["networks.rank belongs to another kind of networks"]),
        ("scenes", "method={name: dmd, gan: {fkae: 1}}", ["unknown key 'method.gan.fkae'", "did you mean 'fake'"]),
        ("scenes", "prompts=scenes", ["prompts holds keys of its own", "source"]),
        ("scenes", "batch", ["key=value"]),
        ("scenes", "cadence={log: 64, log: 128}", ["--set cadence", "column 11: 'log' is set twice"]),
        ("scenes", "prompts.source=", ["prompts.source: must name a file"]),
        ("scenes", "trackers=wandb", ["trackers", "a list in brackets, not 'wandb'"]),
        ("scenes", "micro_batch=7", ["micro_batch", "divide"]),
        ("scens", "batch=1", ["scens", "did you mean 'scenes'"]),
        ("missing.yaml", "batch=1", ["missing.yaml"]),
    ],
)
def test_mistakes_are_named(name, override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(name, [override])
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "override",
    [
        "method.guidance.scale=0",
        "method.guidance.scale=nan",
        "method.guidance.scale=[0,4]",
        "method.guidance.scale=[8,2]",
        "method.guidance.interval=[0,2]",
        "method.guidance.interval=[0.5,0.2]",
        "method.guidance.skip_layers=[-1]",
        "method.guidance.skip_scale=0",
        "method.guidance.skip_interval=[0.9,0.5]",
        "method.times={low: 0.9, high: 0.1}",
        "method.times.mean=inf",
        "method.times.shift=0",
        "method.alpha=-1",
        "optimizer.student_lr=-1e-4",
        "optimizer.fake_lr=inf",
        "optimizer.max_grad_norm=nan",
        "optimizer.betas=[0.9,1]",
        "ema_half_life=inf",
        "prompts.max_count=100000000000000000000",
        "images=1e30",
    ],
)
def test_numbers_out_of_range_are_refused_by_the_name_of_the_key(override):
    key = override.partition("=")[0].rpartition(".")[2]
    with pytest.raises(ConfigError, match=rf"^\S*{key}|: {key} must go from low to high"):
        load_config("scenes", [override])


@pytest.mark.parametrize("preset", ["scenes", "sd3-medium-lora"])
@pytest.mark.parametrize(
    "sets",
    [
        ["method.name=dmd", "method.fake_steps=3"],
        ["method=dmd", "method.fake_steps=3"],
        ["method.fake_steps=3", "method=dmd"],
        ["method.name=reflow", "method.fake_steps=3", "method.name=dmd"],
    ],
)
def test_another_method_is_chosen_first_and_keeps_the_guidance_of_the_teacher(preset, sets):
    method = load_config(preset, sets).method
    assert (method.name, method.fake_steps) == ("dmd", 3)
    assert method.guidance == load_config(preset).method.guidance


def test_a_method_without_a_fake_keeps_what_it_knows_of_the_guidance():
    assert load_config("sd3-medium-lora", ["method=flow_map"]).method.guidance.scale == 4.5


def test_the_method_that_a_preset_has_keeps_its_settings():
    assert load_config("sd3-medium-lora", ["method.name=dmd", "method=fgm"]) == load_config("sd3-medium-lora")
    own = load_config("scenes", ["method={name: dmd, fake_steps: 2}", "method.name=dmd"]).method
    assert (own.name, own.fake_steps) == ("dmd", 2)


@pytest.mark.parametrize("choice", ["networks.kind=full", "networks=full"])
def test_another_kind_of_networks_keeps_how_they_compute(choice):
    assert load_config("sd3-medium-lora", [choice]).networks == Full(gradient_checkpointing=True, compile="auto")


def test_a_file_may_name_a_method_alone(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: dmd\nnetworks: lora\nreal: null\n")
    config = load_config(str(path), ["networks.rank=4"])
    assert (config.method.name, config.networks) == ("dmd", Lora(rank=4))
    with pytest.raises(ConfigError, match="real: this dmd takes no real images"):
        load_config(str(path), ["real.source=scenes"])


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "xformers"])
def test_kernels_without_a_forward_derivative_are_refused_where_one_is_taken(kernel):
    own = ["method={name: flow_map}", "networks.kind=full"]
    with pytest.raises(ConfigError, match=f"attention {kernel} has no forward-mode derivative, which flow_map takes"):
        load_config("scenes", [*own, f"networks.attention={kernel}"])
    assert load_config("scenes", [*own, "networks.attention=math"]).networks.attention == "math"


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "broken.yaml"
    for text, fault in [
        ("a: [", "line 1"),
        ("- 1\n- 2\n", "keys and values"),
        ("", "holds no keys"),
        ("# images: 64\n", "holds no keys"),
        ("images: 64\nbatch: 16\nimages: 320\n", "line 3, column 1: 'images' is set twice"),
        ("images: 64\0\n", "not YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"broken\.yaml.*{fault}"):
            load_config(str(path))
    path.write_text("cadence: &a {log: 64}\noptimizer: {<<: &b {student_lr: 1.0}, student_lr: 2.0}\n")
    assert load_config(str(path)).optimizer.student_lr == 2


def test_a_wrong_value_of_any_size_is_shown_in_short(tmp_path):
    path = tmp_path / "large.yaml"
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 9))
    path.write_text(f"l0: &l0 [x]\n{levels}images: *l8\n")
    with pytest.raises(ConfigError, match=r"images.*\.\.\.") as caught:
        load_config(str(path))
    assert len(str(caught.value)) < 2000


def test_a_budget_of_less_than_a_step_is_refused():
    with pytest.raises(ConfigError, match="images 511 is less than one batch of 512"):
        load_config("scenes", ["images=511"])


def test_identity_holds_everything_but_budget_and_cadence():
    base = load_config("scenes")
    assert load_config("scenes", ["images=777", "cadence.log=3"]).identity() == base.identity()
    assert load_config("scenes", ["networks.compile=true", "networks.attention=math"]).identity() == base.identity()
    assert load_config("scenes", ["sizes=[[64,64]]"]).identity() != base.identity()
    assert load_config("scenes", ["seed=7"]).identity() != base.identity()
    assert load_config("scenes", ["method.alpha=0.7"]).identity() != base.identity()
