"""The options of a job, and the configuration of its run."""

import pytest
from pydantic import ValidationError

from distill.config import load_config
from service.jobs.fine_tuning.options import FLAGS, DistillationOptions

EVERYTHING = {
    "method": "dmd",
    "images": 64,
    "max_prompts": 8,
    "column": "words",
    "batch": 4,
    "micro_batch": 2,
    "guidance_scale": 3.5,
    "student_lr": 1e-5,
    "fake_lr": 2e-5,
    "warmup_images": 0,
    "decay_images": 32,
    "ema_half_life": 900,
    "precision": "fp32",
    "sizes": [[64, 64], [64, 32]],
    "early_stopping_patience": 2,
    "evaluation_images": 6,
    "log_every": 4,
    "sample_every": 8,
    "checkpoint_every": 16,
    "evaluate_every": 32,
}


def test_every_option_is_a_key_of_a_run():
    networks = {"networks": "lora", "rank": 4, "gradient_checkpointing": True}
    assert EVERYTHING.keys() | networks.keys() == DistillationOptions.model_fields.keys() - FLAGS
    options = DistillationOptions(**EVERYTHING, **networks)
    run = load_config("scenes-debug", options.overrides())
    assert (run.images, run.batch, run.micro_batch, run.prompts.max_count) == (64, 4, 2, 8)
    assert run.prompts.column == "words"
    assert run.method.name == "dmd"
    assert (run.method.guidance.scale, run.optimizer.student_lr, run.optimizer.fake_lr) == (3.5, 1e-5, 2e-5)
    assert (run.ema_half_life, run.precision, run.early_stopping_patience) == (900, "fp32", 2)
    assert (run.optimizer.warmup_images, run.optimizer.decay_images) == (0, 32)
    assert run.evaluation.images == 6
    assert run.sizes == ((64, 64), (64, 32))
    assert run.cadence.model_dump(include={"log", "sample", "checkpoint", "evaluate"}) == {
        "log": 4,
        "sample": 8,
        "checkpoint": 16,
        "evaluate": 32,
    }
    assert (run.networks.kind, run.networks.rank, run.networks.gradient_checkpointing) == ("lora", 4, True)
    assert load_config("sd3-medium-lora", DistillationOptions(rank=8).overrides()).networks.rank == 8
    assert load_config("sd3-medium-lora", DistillationOptions(networks="full").overrides()).networks.kind == "full"


@pytest.mark.parametrize(
    "given", [{"rnak": 3}, {"images": 8, "seconds": 9.0}, {"preset": "../x"}, {"batch": 0}, {"column": "\0"}]
)
def test_an_unknown_or_invalid_option_is_refused(given):
    with pytest.raises(ValidationError):
        DistillationOptions(**given)
