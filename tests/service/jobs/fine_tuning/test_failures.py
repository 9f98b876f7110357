"""How a job fails."""

import pytest

from service.jobs.fine_tuning.failures import refusal


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("could not save run: No space left on device; make room", "disk_full", None),
        ("No space left for run: it needs 8.2 MB, and its disk has 300 kB; free some", "disk_full", None),
        ("prompts.jsonl line 3 is not JSON", "invalid_training_file", "training_file"),
        ("no method 'fmg'", "distillation_failed", "distillation"),
    ],
)
def test_a_refusal_names_the_field_at_fault(message, code, param):
    assert refusal(message).error == {"code": code, "message": message, "param": param}


def test_a_refusal_repeats_only_the_ends_of_long_text():
    refused = refusal(f"prompts.parquet has no column prompt, only {'x' * 5000}; rename one")
    assert refused.error["code"] == "invalid_training_file"
    assert refused.error["message"].startswith("prompts.parquet has no column prompt")
    assert refused.error["message"].endswith("; rename one")
    assert "x" * 201 not in refused.error["message"]
