"""The input of a plan has the settings of the command, of a run, or of the model's own preset."""

import json
from dataclasses import replace

import pytest

from distill.config import Cadence, EvaluationSettings, Full, Lora, load_config
from distill.errors import ConfigError
from distill.models.geometry import NAMES, PUBLISHED, read_geometry
from distill.plan.options import run_input, teacher_config
from distill.plan.step_cost import network_calls


def test_a_published_model_is_known_by_its_transformer_and_planned_with_its_own_guidance(teacher):
    for name in NAMES:
        named = read_geometry(name)
        fetched = replace(named, name="mine", transformer=json.loads(json.dumps(named.transformer | {"more": 1})))
        assert fetched.published == name
        assert bool(teacher_config(fetched).method.guidance.skip_layers) == (name == "sd3.5-medium")
    other = read_geometry(str(teacher))
    assert other.published is None
    with pytest.raises(ConfigError, match=r"^method.guidance.skip_layers: there is no block 7"):
        run_input(other, teacher_config(other, ["method.guidance.skip_layers=[7]"]))


def test_published_presets_are_planned_without_their_teachers_files():
    for name in ("sd3-medium-full", "sd3.5-medium-lora", "sd3.5-large-lora"):
        config = load_config(name)
        made = run_input(read_geometry(PUBLISHED[config.teacher]), config)
        assert made.geometry.image_size == made.size == 1024
        assert (made.batch, made.kind) == (config.micro_batch, config.networks)


def test_a_teacher_is_planned_with_the_defaults_of_the_command_and_not_with_those_of_a_preset():
    geometry = read_geometry("sd3.5-large")
    for kind in (Lora(), Full()):
        config = teacher_config(geometry, [f"networks.kind={kind.kind}", "optimizer.kind=adam-8bit", "images=3"])
        made = run_input(geometry, config)
        assert (made.kind, made.size, made.optimizer, made.online) == (kind, 1024, "adam-8bit", True)
        assert (config.images, config.prompts.max_count, config.precision) == (3, 1_000_000, "bf16")
        assert (config.evaluation, config.cadence) == (EvaluationSettings(), Cadence())


def test_text_encoders_take_less_memory_in_8_bits_and_none_on_another_device():
    sets = ([], ["prompts.t5=int8"], ["prompts.encoder_device=cpu"], ["prompts.encoding=cached"])
    geometry = read_geometry("sd3-medium")
    whole, int8, *none = (run_input(geometry, load_config("sd3-medium-lora", each)).text_bytes for each in sets)
    assert [round(size / 1e9, 1) for size in (whole, int8)] == [11.2, 6.5]
    assert none == [0, 0]


def test_settings_of_the_method_can_be_planned(teacher):
    geometry = read_geometry(str(teacher))
    sets = ["method.guidance.guide_fake=false", "method.guidance.skip_layers=[0]"]
    made = run_input(geometry, teacher_config(geometry, sets))
    calls = [call for phase in made.method.update_phases() for call in network_calls(phase) if phase.role == "student"]
    assert [(call.role, call.rows, call.skip_layers) for call in calls] == [
        ("student", 1, ()),
        ("teacher", 2, ()),
        ("teacher", 1, (0,)),
        ("fake", 1, ()),
    ]
