"""One training of a small decoder, from a model to the folder `decoder/`: what `distill decoder` calls.

The folder: `config.yaml` (resolved), `state.json` (its phase), `latents/`, `real-latents/` and `evaluation-latents/`
(caches of what it is trained and evaluated on), `speed.json` (measured for a budget in seconds), `checkpoints/`,
`metrics.jsonl`, `evaluations.jsonl`, `alarms.jsonl`, `samples/` (grids), and at the end `decoder/`. The same call
resumes a training. `distill report` and `distill runs` read it like the folder of a distillation.
"""

import gc
import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderTiny

from distill.data.images import read_examples
from distill.data.prompts import DistinctPrompts, read_prompts
from distill.data.sources import PROMPT_SOURCES, Example
from distill.decoder.evaluation import DecoderEvaluator, meets_score
from distill.decoder.evaluation_callback import DecoderEvaluationCallback
from distill.decoder.export import export_decoder
from distill.decoder.latents import LatentProgress, LatentSet, MakeLatents, PromptLatents, RealLatents, latent_maker
from distill.decoder.recipe import DecoderConfig, DecoderRecipe
from distill.decoder.train import CHECKPOINTS, DecoderTraining
from distill.errors import CheckpointError, ConfigError, OutputError
from distill.evaluate.base import EvalPrompts
from distill.evaluate.datasets import find_eval_dataset
from distill.evaluate.sampler import Sampling
from distill.files import atomic_write_text
from distill.models.sd3 import load_vae
from distill.models.sd3_files import DECODER, RECORD, find_weights, read_json
from distill.models.sd3_folder import SD3Folder, check_weights
from distill.models.small_decoder import make_small_decoder
from distill.philox import key_of
from distill.report.run_folder import ALARMS, EVALUATIONS, METRICS
from distill.report.run_state import STATE, StateRecorder
from distill.student.decoder import Default, add_decoder, check_decoder_files, check_decoder_place, digest_of
from distill.student.spec import is_student
from distill.training import checkpoint
from distill.training.run_lock import run_lock
from distill.training.speed import SPEED, images_within, read_speed, write_speed
from distill.training.state import TrainingProgress, check_state

CONFIG = "config.yaml"
LATENTS, REAL, EVALUATION = "latents", "real-latents", "evaluation-latents"
_FILES = (CHECKPOINTS, METRICS, EVALUATIONS, ALARMS, STATE, SPEED, DECODER, "samples")  # of a training


@dataclass(frozen=True)
class DecoderRun:
    """What a training is started with: the model, how it is sampled, and the folder of the training.

    `sampling` is None for a student. `students` get the decoder at the end, with this `default`; None is `small` if the
    score of a dataset shows no loss, else `full`.
    """

    config: DecoderConfig
    model: SD3Folder
    sampling: Sampling | None
    out: Path
    students: tuple[SD3Folder, ...] = ()
    default: Default | None = None

    @cached_property
    def prompts(self) -> list[str]:
        """The first distinct prompts, as many as training or evaluation takes; a source that is a stream is read once.

        Raises PromptError.
        """
        count = max(self.config.latents, self.config.evaluation_images)
        return list(islice(DistinctPrompts(read_prompts(self.config.prompts)), count))


def resolve(
    recipe: DecoderRecipe, model: SD3Folder, sampling: Sampling | None, prompts: str | None, real: str | None
) -> DecoderConfig:
    """Complete a recipe: its width and blocks, and the source of prompts, which is the model's own if None.

    Raises ConfigError if the model's own prompts are not known here.
    """
    widths = read_json(model.path / "vae" / "config.json")["block_out_channels"]
    stages = model.vae_scale_factor.bit_length()
    values = recipe.model_dump() | {
        "width": recipe.width or max(16, min(widths) // 2),
        "blocks": recipe.blocks if recipe.blocks is not None else (*(3,) * (stages - 1), 1),
    }
    return DecoderConfig(
        **values,
        teacher=str(read_json(model.path / RECORD)["name"]) if is_student(model) else model.reference,
        model_digest=model.digest,
        teacher_steps=1 if sampling is None else sampling.steps,
        guidance=1.0 if sampling is None else sampling.scale,
        prompts=_own_prompts(model) if prompts is None else prompts,
        real=real,
    )


def _own_prompts(model: SD3Folder) -> str:
    """The source of a student's prompts by its record, or the source of a teacher's name."""
    name = model.name
    if is_student(model):
        own = read_json(model.path / RECORD).get("prompts")
        name = str(own.get("source")) if isinstance(own, dict) else ""
    if name not in PROMPT_SOURCES:
        which = f"its prompts were {name!r}" if is_student(model) and name else "it names no prompts"
        raise ConfigError(
            f"{model.name} makes the images that the decoder learns from, and {which}; give --prompts FILE"
        )
    return name


def distill_decoder(
    run: DecoderRun, device: torch.device, seconds: float | None = None
) -> Generator[LatentProgress | TrainingProgress]:
    """Train to the budget, export to `out/decoder` and add it to the students; skip what is done.

    `seconds` of training are a budget in place of `config.images`. Close the generator to interrupt the training, after
    `progress.save()`. Raises what `check` raises before anything is written, ClaimedError while another process writes
    to the folder, and what the caches and the training raise.
    """
    check(run)
    with run_lock(run.out):
        state = StateRecorder(run.out, run.config.images)
        state.images = checkpoint.images_in(run.out / CHECKPOINTS)

        # 1. latents of prompts, and of real images
        with state.phase("sampling"):
            _write_config(run.out, run.config)
            texts, scored = _evaluation_prompts(run)
            training, evaluation = _prompt_latents(run, texts)
            yield from _make(run, (training, evaluation), device)
            readers = [training.open(device)]
            if run.config.real is not None:
                real = RealLatents(run.out / REAL, run.model, lambda: _real_images(run.config))
                yield from real.make(device)
                readers.append(real.open(device))
            training_latents = LatentSet(readers)
        vae = load_vae(run.model, device=device)

        # 2. turn seconds into images
        config = run.config
        if seconds is not None:
            speed = read_speed(run.out)
            if speed is None:
                speed = DecoderTraining(config, vae, _untrained(config, run.model), training_latents).speed()
                write_speed(run.out, speed)
            state.budget = images_within(seconds, speed, config.batch)
            config = config.model_copy(update={"images": state.budget})
            _write_config(run.out, config)

        # 3. train
        with state.phase("training"):
            trained = DecoderTraining(config, vae, _untrained(config, run.model), training_latents)
            latents = evaluation.open()
            rows = latents.rows(torch.arange(len(latents)))["latents"]
            evaluator = DecoderEvaluator(vae, rows, texts, scored)
            callback = DecoderEvaluationCallback(config, run.out, state.images, evaluator, trained.average)
            for progress in trained.run(run.out):
                state.images = progress.images
                callback(progress)
                yield progress

            # 4. export
            seen = state.images
            if not callback.metrics:  # it was killed between the last checkpoint and its evaluation
                callback.evaluate(TrainingProgress(seen, seen, config.images, {}, lambda: None))
            metrics = callback.metrics
            export_decoder(run.out / DECODER, config, run.model, trained.average, metrics, seen)
            for student in run.students:
                default: Default = run.default or ("small" if meets_score(metrics) else "full")
                add_decoder(student.path, run.out / DECODER, default, metrics)
            state.record("finished")


def _write_config(out: Path, config: DecoderConfig) -> None:
    atomic_write_text(out / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def check(run: DecoderRun) -> None:
    """Check the model, the sources, the folder and the students; nothing is written.

    Raises ConfigError for blocks that do not fit the VAE and for a student of another VAE, PromptError and ImageError
    for the sources, CheckpointError for a training with other settings, and OutputError if files would be replaced that
    belong to no training of a decoder.
    """
    config, out = run.config, run.out
    _untrained(config, run.model)
    for model in (run.model, *run.students):
        if out.resolve().is_relative_to(model.path.resolve()):
            raise OutputError(f"{out} is inside the model {model.path}; give an --out outside of it")
    path = out / CONFIG
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as YAML ({error}); give another --out") from None
    if path.exists() and not (isinstance(before, dict) and before.get("kind") == "decoder"):
        raise OutputError(f"{out} holds another run than that of a decoder; give another --out")
    if not path.exists():
        for name in _FILES:
            if (out / name).exists():
                raise OutputError(f"{out} holds {name}, but no {CONFIG} of a decoder; give another --out")
    check_state(out / CHECKPOINTS, config)
    check_decoder_files(out / DECODER)
    len(run.prompts)  # reads them; not in an assert, which python -O leaves out
    if config.real is not None:
        next(_real_images(config))
    for student in run.students:
        check_decoder_place(student.path, digest_of(out / DECODER))
        if _vae_digest(student) != _vae_digest(run.model):
            raise ConfigError(f"{student.path} has another VAE than {run.model.name}; name a student of the same VAE")


def _vae_digest(model: SD3Folder) -> str:
    """The identity of a VAE's weights, whatever its files are called, with the scale of its latents."""
    identity = hashlib.sha256(f"{model.scaling_factor} {model.shift_factor}".encode())
    for file in find_weights(model.path / "vae").files:
        check_weights(file, identity)
    return identity.hexdigest()


def _untrained(config: DecoderConfig, model: SD3Folder) -> AutoencoderTiny:
    torch.manual_seed(key_of(config.seed, "decoder weights"))
    return make_small_decoder(model.latent_channels, model.vae_scale_factor, config.width or 0, config.blocks or ())


def _evaluation_prompts(run: DecoderRun) -> tuple[list[str], EvalPrompts | None]:
    """The prompts of the evaluation: held-out ones of a dataset with a scorer, else the first ones of the source.

    Those of a dataset are, with their seeds, the ones of `distill evaluate`.
    """
    config, side = run.config, run.model.image_size
    dataset = find_eval_dataset((config.prompts, run.model.name), (side, side))
    if dataset is not None:
        scored = dataset.prompts(config.per_task, 0)
        return list(scored.texts), scored
    return list(islice(cycle(run.prompts), config.evaluation_images)), None


def _prompt_latents(run: DecoderRun, texts: list[str]) -> tuple[PromptLatents, PromptLatents]:
    """The caches of the training and of the evaluation; their seeds differ."""
    config = run.config
    source = run.model, run.sampling
    return (
        PromptLatents(run.out / LATENTS, *source, run.prompts[: config.latents], config.latents),
        PromptLatents(run.out / EVALUATION, *source, texts, len(texts), first_seed=0),
    )


def _make(
    run: DecoderRun, caches: tuple[PromptLatents, PromptLatents], device: torch.device
) -> Iterator[LatentProgress]:
    """Make what is missing of the caches; the model is loaded at most once, and freed afterwards."""
    loaded: list[MakeLatents] = []

    def maker() -> MakeLatents:
        if not loaded:
            loaded.append(latent_maker(run.model, run.sampling, device))
        return loaded[0]

    for cache, what in zip(caches, ("latents", "evaluation latents"), strict=True):
        yield from cache.make(maker, what)
    loaded.clear()
    gc.collect()


def _real_images(config: DecoderConfig) -> Iterator[Example]:
    return read_examples(str(config.real), None, config.seed)
