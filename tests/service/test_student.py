"""The server over a real, tiny student."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from running import serving

from distill.export import export_student
from distill.pipeline import OneStepPipeline
from distill.teacher import load_transformer
from service.app import create_app
from service.errors import StartError
from service.registry import load_backends
from service.settings import Settings


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    weights = load_transformer(teacher).state_dict()
    recipe = {"name": "tiny-student", "method": "fgm", "images_seen": 0}
    return export_student(teacher, weights, tmp_path_factory.mktemp("students") / "tiny", recipe)


def test_the_answer_is_what_the_pipeline_makes(student, connect):
    prompts = ["a red circle", "a blue square", "a red circle"]
    expected = OneStepPipeline.load(student)(prompts, [5, 6, 7]).numpy()
    with serving(create_app(Settings(models=(student,), device="cpu"))) as url:
        client = connect(url)
        with ThreadPoolExecutor(3) as pool:
            answers = list(
                pool.map(lambda p, s: client.images.generate(prompt=p, extra_body={"seed": s}), prompts, [5, 6, 7])
            )
        long = client.images.generate(prompt="a red circle " * 9)
        assert [model.id for model in client.models.list()] == ["tiny-student"]
    for answer, image in zip(answers, expected, strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))
        # a batch of another size may round a last bit differently on its way to 8 bits
        assert np.abs(decoded.astype(int) - image).max() <= 1
    assert answers[0].usage.input_tokens == 5
    assert long.usage.input_tokens == 8
    assert "8 tokens" in long.warnings[0]


def test_tokens_are_counted_beside_the_device(student):
    backend = load_backends(Settings(models=(student,), device="cpu"))["tiny-student"]
    with ThreadPoolExecutor(4) as pool:
        counts = pool.map(backend.count_tokens, ["a red circle", "a blue square left of a red circle"] * 100)
        for seed in range(20):
            backend.generate(["a", "a red circle"], [seed, seed], 16, 16)
        assert list(counts) == [(5, False), (8, True)] * 100


def test_two_models_of_one_name_are_refused(student):
    with pytest.raises(StartError, match="tiny-student"):
        load_backends(Settings(models=(student, student), device="cpu"))
