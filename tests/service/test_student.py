"""The server with a real, tiny student and two worker processes gives the pixels of the pipeline."""

import asyncio
import base64
import io
import os
import shutil
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import torch
from engines import make, make_all, run
from PIL import Image
from running import metric, serving, until
from safetensors.torch import load_file, save_file
from tiny import undistilled
from worker_threads import worker_threads

from distill.models.sd3 import load_transformer
from distill.models.sd3_files import decoder_digest
from distill.models.sd3_folder import SD3Folder
from distill.models.small_decoder import make_small_decoder
from distill.models.two_times import add_second_time
from distill.pipeline import OneStepPipeline
from distill.student.export import export_student
from service.app import create_app
from service.engine.backend import ModelInfo
from service.engine.embeddings import EmbeddingAllocator, SharedEmbeddings
from service.engine.engine import Engine
from service.engine.launch import SharedMemory, WorkerPool, worker_processes
from service.engine.model_loader import load_backend
from service.engine.simulator import Simulator
from service.errors import GenerationFailed, InvalidRequest, StartError
from service.settings import Settings

RECIPE = {"name": "tiny-student", "method": "fgm", "images_seen": 0}


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    return undistilled(teacher, tmp_path_factory.mktemp("students") / "tiny", "tiny-student")


@pytest.fixture(scope="module")
def settings(student) -> Settings:
    return Settings(models=(student,), engine={"devices": "cpu", "workers_per_device": 2})


@pytest.fixture(scope="module")
def workers(settings) -> WorkerPool:
    workers = worker_processes(settings)
    workers.start()
    return workers


@pytest.fixture(scope="module")
def url(settings, workers):
    with serving(create_app(settings, workers)) as url:
        yield url


def pixels(answer) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))


def named(info: ModelInfo) -> dict:
    """Return the model and its native size as fields of a request."""
    width, height = info.sizes[0]
    return {"model": info.name, "width": width, "height": height}


def test_prompts_are_cut_and_counted_by_the_workers(url, connect):
    client = connect(url)
    assert [model.id for model in client.models.list()] == ["tiny-student"]
    short = client.images.generate(prompt="a red circle")
    assert (short.usage.input_tokens, getattr(short, "warnings", None)) == (5, None)
    long = client.images.generate(prompt="a red circle " * 9)
    assert long.usage.input_tokens == 8
    assert "8 tokens" in long.warnings[0]


def test_what_one_worker_process_has_encoded_another_does_not(student, url, workers, connect):
    client, (one, other) = connect(url), [worker.process.pid for worker in workers.start()]

    def ask(prompt: str, seed: int):
        return pixels(client.images.generate(prompt=prompt, extra_body={"seed": seed}))

    sent, hits = metric(url, "closed_batches_total"), metric(url, "cache_hits_total", cache="prompt")
    with ThreadPoolExecutor(1) as pool:
        os.kill(one, signal.SIGSTOP)  # the first that an idle server gives work
        waiting = pool.submit(ask, "keeps the first one busy", 1)
        until(lambda: metric(url, "closed_batches_total") == sent + 1)
        ask("a green ring", 1)
        os.kill(one, signal.SIGCONT)
        waiting.result()
    assert metric(url, "cache_hits_total", cache="prompt") == hits
    os.kill(other, signal.SIGSTOP)
    image = ask("a green ring", 2)
    os.kill(other, signal.SIGCONT)
    assert metric(url, "cache_hits_total", cache="prompt") == hits + 1
    assert np.array_equal(image, OneStepPipeline.load(student)(["a green ring"], [2])[0].numpy())


def test_the_pipelines_bits_in_any_batch_on_any_worker_and_after_one_is_killed(student, url, workers, connect):
    prompts = ["a red circle", "a blue square", "a green star"] * 20
    expected = OneStepPipeline.load(student)(prompts, range(60)).numpy()  # by one thread, as in the workers
    client = connect(url)

    def ask(seed: int):
        return client.images.generate(prompt=prompts[seed], extra_body={"seed": seed})

    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(ask, seed) for seed in range(60)]
        until(lambda: metric(url, "images_total") > 10)
        os.kill(workers.start()[0].process.pid, signal.SIGKILL)
        answers = [done.result() for done in asked]
    for answer, image in zip(answers, expected, strict=True):
        assert np.array_equal(pixels(answer), image)
    until(lambda: metric(url, "worker_restarts_total", reason="died") == 1)


def test_a_prompt_that_one_worker_has_encoded_another_reads_to_the_bit(student):
    one, other = (load_backend(str(student), None, "cpu", {"precision": "bf16"}) for _ in range(2))
    memory, allocator = SharedMemory(), EmbeddingAllocator(1 << 20)

    def shared(*prompts: str) -> SharedEmbeddings:
        places = {prompt: allocator.allocate(prompt, one.text_bytes).slot for prompt in prompts}
        return SharedEmbeddings(memory.descriptor, places)

    made = one.encode(["a", "a red circle " * 9, "a"], shared("a", "a red circle " * 9))
    read = other.encode(["a red circle " * 9, "c"], shared("a red circle " * 9, "c"))
    assert (made.hits, read.hits) == (0, 1)
    alone = other.encode(["a red circle " * 9])
    for text, i in ((made, 1), (read, 0)):
        assert text.conditions.embeds[i].equal(alone.conditions.embeds[0])
        assert text.conditions.pooled[i].equal(alone.conditions.pooled[0])
        assert (text.tokens[i], text.truncated[i]) == (alone.tokens[0], alone.truncated[0]) == (8, True)


def test_how_a_student_is_computed_reaches_it_and_names_its_images(student, tmp_path):
    options = {"precision": "bf16", "attention": "math", "channels_last": True, "batch_buckets": [2, 1]}
    runtime = Settings(runtime=options).runtime.model_dump(mode="json")
    info, setup = (backend := load_backend(str(student), None, "cpu", runtime)).info, backend.environment
    assert info.runtime_fingerprint == "bf16-text-1-2-16x16-network-1-2-decoder-1-2-attention-math-channels_last"
    assert info.runtime_fingerprint in setup
    plain = load_backend(str(student), None, "cpu").info
    assert info.cache_key != plain.cache_key
    assert (plain.decoder, plain.decoder_digest) == ("full", None)
    make_small_decoder(4, 2, 4, (0, 0)).save_pretrained(tmp_path)
    runtime = Settings(runtime={"decoder": str(tmp_path)}).runtime.model_dump(mode="json")
    small = load_backend(str(student), None, "cpu", runtime).info
    assert (small.decoder, small.decoder_digest) == ("small", decoder_digest(tmp_path))
    assert small.digest == plain.digest
    assert small.cache_key != plain.cache_key
    with pytest.raises(StartError, match="cuda_graphs needs a CUDA device"):
        load_backend(str(student), None, "cpu", {"cuda_graphs": True})


def test_a_device_that_is_none_is_named(student):
    with pytest.raises(StartError, match="on tpu9: "):
        load_backend(str(student), None, "tpu9")


def test_a_network_that_gives_no_numbers_fails_its_batch(student):
    backend = load_backend(str(student), None, "cpu")
    conditions, size = backend.encode(["a", "b"]).conditions, backend.info.sizes[0]
    conditions.pooled[1] = float("nan")
    with pytest.raises(FloatingPointError):
        backend.denoise(conditions, backend.noise([1, 2], *size))


@pytest.fixture(scope="module")
def any_step_student(teacher, tmp_path_factory):
    torch.manual_seed(5)
    transformer = load_transformer(SD3Folder.read(teacher))
    add_second_time(transformer)
    for parameter in transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    weights = dict(transformer.named_parameters())
    return export_student(SD3Folder.read(teacher), weights, tmp_path_factory.mktemp("students") / "any-step", RECIPE)


def test_an_any_step_student_takes_steps_over_rest(any_step_student, url, connect):
    pipeline = OneStepPipeline.load(any_step_student)
    backend = load_backend(str(any_step_student), None, "cpu")
    with serving(create_app(Settings(), worker_threads(backend))) as any_step:
        client = connect(any_step)
        for steps in (1, 4):
            answer = client.images.generate(prompt="a", extra_body={"seed": 1, "steps": steps})
            assert np.array_equal(pixels(answer), pipeline(["a"], [1], steps=steps)[0].numpy())
    with pytest.raises(openai.BadRequestError, match="tiny-student makes images in one step") as refused:
        connect(url).images.generate(prompt="a", extra_body={"steps": 4})
    assert refused.value.param == "steps"


def test_an_any_step_student_makes_images_in_the_steps_of_each_request(any_step_student):
    pipeline = OneStepPipeline.load(any_step_student)
    expected = [pipeline(["a"], [seed], steps=steps)[0].numpy() for seed, steps in ((1, 1), (1, 4), (2, 4), (1, 2))]
    assert not np.array_equal(expected[0], expected[1])

    async def test(engine: Engine) -> None:
        options = named(backend.info)
        requests = [make_all(engine, [1, 2] if steps == 4 else [1], steps=steps, **options) for steps in (1, 4, 2)]
        images = [image for made in await asyncio.gather(*requests) for image in made]
        for image, pixels in zip(images, expected, strict=True):
            assert np.array_equal(image.pixels, pixels)

    backend = load_backend(str(any_step_student), None, "cpu")
    assert backend.info.max_steps > 4
    run(worker_threads(backend), test)


def test_an_adapter_changes_its_own_images_alone_and_those_to_the_bit(student, tmp_path):
    torch.manual_seed(5)
    name = "transformer.transformer_blocks.0.attn.to_q"
    shape = load_file(student / "transformer" / "diffusion_pytorch_model.safetensors")[f"{name[12:]}.weight"].shape
    factors = {f"{name}.lora_A.weight": torch.randn(2, shape[1]), f"{name}.lora_B.weight": torch.randn(shape[0], 2)}
    save_file(factors, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = OneStepPipeline.load(student)
    prompts = ["a red circle"] * 2
    plain = pipeline(prompts, [1, 2]).numpy()
    pipeline.adapt(pipeline.read_adapter(tmp_path), 3.0)
    adapted = pipeline(prompts, [1, 2]).numpy()
    assert not np.array_equal(plain, adapted)

    async def test(engine: Engine) -> None:
        async def one(seed, **options):
            return (await make(engine, seed, "a red circle", **named(backend.info), **options)).pixels

        with pytest.raises(InvalidRequest, match=r"neither a folder nor a \.safetensors file"):
            await engine.catalog.load_adapter("tiny-student", tmp_path / "nowhere", "style")
        await engine.catalog.load_adapter("tiny-student", tmp_path, "style")
        style = {"adapter": "style", "scale": 3.0}
        made = await asyncio.gather(
            one(1), one(1, **style), one(2), one(2, **style), one(1, adapter="style", scale=0.0)
        )
        for pixels, expected in zip(made, (plain[0], adapted[0], plain[1], adapted[1], plain[0]), strict=True):
            assert np.array_equal(pixels, expected)
        await engine.catalog.unload("tiny-student", "style")
        with pytest.raises(InvalidRequest, match="style"):
            await one(1, **style)
        assert np.array_equal(await one(1), plain[0])

    backend = load_backend(str(student), None, "cpu")
    run(worker_threads(backend), test, engine={"result_cache_bytes": 0})


def test_weights_that_are_not_finite_are_not_loaded(student, tmp_path):
    path = shutil.copytree(student, tmp_path / "student") / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["proj_out.bias"][0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(StartError, match=r"proj_out\.bias is not finite"):
        load_backend(str(tmp_path / "student"), None, "cpu")
    shape = weights["proj_out.weight"].shape
    factors = {"transformer.proj_out.lora_A.weight": torch.zeros(2, shape[1])}
    factors["transformer.proj_out.lora_B.weight"] = torch.full((shape[0], 2), torch.inf)
    save_file(factors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(StartError, match=r"lora_B\.weight is not finite"):
        load_backend(str(student), None, "cpu").add_adapter("style", str(tmp_path))


def test_an_image_that_is_not_finite_after_the_vae_fails_alone(student):
    backend = load_backend(str(student), None, "cpu")
    decode = backend._pipeline._vae.decode

    def overflowing(latents, **options):
        """Overflows for large latents, as fp16 does."""
        (pixels,) = decode(latents, **options)
        return (torch.where(latents.abs().amax((1, 2, 3), keepdim=True) > 1e4, torch.inf, pixels),)

    backend._pipeline._vae.decode = overflowing
    denoise, large = backend.denoise, backend.noise([103], *backend.info.sizes[0])
    backend.denoise = lambda conditions, noise, steps=1: torch.where(
        (noise == large).flatten(1).all(1).view(-1, 1, 1, 1), 1e6, denoise(conditions, noise, steps)
    )

    async def test(engine: Engine) -> None:
        asked = [make(engine, seed, **named(backend.info)) for seed in range(100, 106)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(answer, GenerationFailed) for answer in answers] == [False, False, False, True, False, False]

    run(worker_threads(backend), test)


def test_a_student_is_loaded_beside_another_model_and_its_memory_given_back(student):
    backend = load_backend(str(student), "other", "cpu")
    assert backend.info.name == "other"
    weights = weakref.ref(backend._pipeline)
    backend.encode(["a"])
    backend.close()
    assert weights() is None

    async def test(engine: Engine) -> None:
        with pytest.raises(InvalidRequest, match="model_index"):
            await engine.catalog.load(student.parent)
        info = await engine.catalog.load(student)
        image = await make(engine, 3, "a red circle", **named(info))
        assert np.array_equal(image.pixels, OneStepPipeline.load(student)(["a red circle"], [3])[0].numpy())

    run(worker_threads(Simulator(0, 0), device="cpu"), test)
