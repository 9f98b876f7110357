"""The choices for a job, without a server."""

import pytest

from distill import methods, presets
from distill.config import load_config
from service.jobs.fine_tuning.choices import MIN_STEPS, budget_warning, job_choices
from service.jobs.fine_tuning.options import DistillationOptions
from service.settings import Settings


def test_choices_are_the_teachers_presets_and_methods_of_the_server(tmp_path):
    teachers = {"scenes": "scenes", "sd3": "stabilityai/stable-diffusion-3-medium-diffusers", "gone": str(tmp_path)}
    choices = job_choices(Settings(data=None, jobs={"teachers": teachers, "max_images_per_job": 9}))
    assert {each.name: each.available for each in choices.teachers}["scenes"]
    assert not {each.name: each.available for each in choices.teachers}["gone"]
    assert [each.name for each in choices.presets] == presets.names()
    assert [each.name for each in choices.methods] == methods.names()
    assert all(each.description for each in (*choices.presets, *choices.methods))
    made_for = {each.name: each.teachers for each in choices.presets}
    assert (made_for["scenes"], made_for["sd3-medium-lora"], made_for["cifar10"]) == (["scenes"], ["sd3"], [])
    assert choices.max_images == 9
    for each in choices.presets:  # with the defaults of a run for what the preset leaves out
        run = load_config(each.name)
        assert (each.images, each.batch, each.method) == (run.images, run.batch, run.method.name)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"images": MIN_STEPS * 512 - 1}, True),
        ({"images": MIN_STEPS * 512}, False),
        ({"images": MIN_STEPS * 8, "batch": 8}, False),
        ({"images": MIN_STEPS * 8 - 1, "batch": 8}, True),
        ({"seconds": 1.0}, False),  # which says nothing of images
        ({}, False),
    ],
)
def test_a_budget_of_few_batches_is_warned_of(options, warned):
    assert (budget_warning(DistillationOptions(preset="scenes", **options)) is not None) == warned
