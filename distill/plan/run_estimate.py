"""`RunEstimate`: what a run needs of disk and time, stated before its work begins."""

import math
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.config import RunConfig
from distill.data.embedding_cache import row_bytes, text_dtype
from distill.errors import OutputError, RunError
from distill.evaluate.references import image_count
from distill.evaluate.sampler import Sampling
from distill.models.geometry import Geometry, read_geometry
from distill.models.sd3_files import MODELS, find_weights
from distill.models.sd3_folder import SD3Folder
from distill.plan.autoencoder import autoencoder_cost
from distill.plan.devices import MATRIX_SHARE, UTILIZATION
from distill.plan.estimate import Plan, PlanInput
from distill.plan.evaluation import evaluation_cost
from distill.plan.flop import encoding_flop, training_flop
from distill.report.units import duration, si
from distill.training import checkpoint
from distill.training.evaluation import GRID
from distill.training.initial_weights import trained_shapes
from distill.training.networks import compiles
from distill.training.run_evaluator import (
    REFERENCES,
    evaluated_images,
    evaluated_size,
    evaluator_kind,
    references_folder,
    run_references,
    teacher_sampling,
)
from distill.training.run_sources import RunImages, RunPrompts
from distill.training.speed import read_speed

SMALL = 1e12  # FLOP per image below which a device mostly waits, and training takes longer than its arithmetic
_MOMENTS = {"adam": 8, "adam-8bit": 2}  # bytes per number


@dataclass(frozen=True)
class RunEstimate:
    """Disk in bytes and time in seconds of what a run has left to do; `prompt_flop` and `image_flop` are FLOP."""

    prompts: int  # distinct
    real_images: int  # that are still to be encoded
    prompt_bytes: int
    is_online: bool
    cache: int  # of prompts that is still to be written
    image_cache: int  # of real images that is still to be written
    checkpoints: int
    student: int
    references: int  # the teacher's images that evaluations compare with, in the run folder
    known_prompts: int  # encoded prompts of evaluations and sample grids, at most, while the run lasts
    prompt_flop: float
    image_flop: float
    encoding_seconds: float  # of prompts, and of real images with their captions
    training_seconds: float
    reference_seconds: float
    evaluation_seconds: float  # of all evaluations with them

    @property
    def disk(self) -> int:
        """Bytes of all that the run writes."""
        return sum((self.cache, self.image_cache, self.checkpoints, self.student, self.references, self.known_prompts))

    def lines(self) -> list[str]:
        """Sentences for people."""
        each, together = si(self.prompt_bytes, "B"), si(self.prompts * self.prompt_bytes, "B")
        if self.is_online:
            share = f"{self.encoding_share:.1%} of the arithmetic of training"
            how = f"encoded online, {share}; a cache of them would take {together}, {each} each"
        elif self.cache:
            how = f"encoded before training, into a cache of {together}, {each} each"
        else:
            how = f"read from a cache of {together}"
        sizes = {"cache": self.cache, "real images": self.image_cache}
        sizes |= {"checkpoints": self.checkpoints, "student": self.student}
        sizes |= {"the teacher's images": self.references, "prompts of evaluations": self.known_prompts}
        disk = ", ".join(f"{name} {si(size, 'B')}" for name, size in sizes.items() if size)
        works = {
            "encoding": self.encoding_seconds,
            "training": self.training_seconds,
            "the teacher's images": self.reference_seconds,
            "evaluations": self.evaluation_seconds,
        }
        work = ", ".join(f"{name} {duration(seconds)}" for name, seconds in works.items() if seconds)
        total = duration(sum(works.values()))
        longer = "; a model as small as this one takes longer than its arithmetic" if self.image_flop < SMALL else ""
        return [
            f"Prompts: {self.prompts} distinct, {how}.",
            f"Disk: {si(self.disk, 'B')} ({disk}).",
            f"Time: about {total} ({work or 'nothing is left to do'}){longer}.",
        ]

    @property
    def encoding_share(self) -> float:
        """Share of online encoding in the arithmetic of training, if each image's prompt is encoded once a round."""
        return self.prompt_flop / (self.prompt_flop + self.image_flop)

    def check_disk(self, out: Path) -> None:
        """Raise OutputError if the file system of the run folder has no room for what is still to be written."""
        folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
        resumed = {
            (RunPrompts.folder,): self.cache,
            (RunImages.folder,): self.image_cache,
            ("checkpoints", "best"): self.checkpoints,
            (REFERENCES,): self.references,
        }
        missing = self.student + self.known_prompts  # a student is written beside the older one
        for parts, size in resumed.items():
            files = (path for part in parts for path in (out / part).rglob("*") if path.is_file())
            missing += max(0, size - sum(path.stat().st_size for path in files))
        disk = shutil.disk_usage(folder)
        if missing > disk.free and disk.total > 0:  # some network file systems do not say
            ways = "free some, give another --out, or keep fewer checkpoints (cadence.keep_checkpoints)"
            online = "" if self.is_online or not self.cache else ", or set prompts.encoding to online"
            needed, free = si(missing, "B"), si(disk.free, "B")
            raise OutputError(f"No space left for {out}: it needs {needed}, and its disk has {free}; {ways}{online}")


def estimate_run(
    config: RunConfig,
    out: Path,
    teacher: SD3Folder,
    prompts: RunPrompts,
    device: torch.device,
    processes: int = 1,
    reals: RunImages | None = None,
) -> RunEstimate:
    """Estimate a run by formulas and a measurement of the device's matrix products, or by the speed it once had.

    Prompts and real images are counted, so a source that is not encoded yet is read.
    """
    geometry = read_geometry(str(teacher.path)).with_text(teacher.clip_length, teacher.max_sequence_length)
    sizes = config.sizes or [(teacher.image_size, teacher.image_size)]
    phases = config.method.update_phases()
    image_flop = training_flop(geometry, config.networks, phases, sizes, config.micro_batch or config.batch)
    prompt_flop = encoding_flop(geometry)
    count, online = prompts.distinct(), prompts.is_online(teacher)
    row = row_bytes(teacher) * text_dtype(device).itemsize // torch.bfloat16.itemsize
    share = UTILIZATION["compiled" if compiles(config.networks.compile, device) else "eager"] / MATRIX_SHARE
    rate = share * matrix_rate(device, text_dtype(device))

    left = max(0, config.images - checkpoint.images_in(out / "checkpoints"))
    flop = left * (image_flop + prompt_flop * online)
    training = flop / (rate * processes)
    with suppress(OSError, RunError):
        if (speed := read_speed(out)) is not None:
            training = left / speed

    trainable = sum(map(math.prod, trained_shapes(config, teacher).values()))
    state = trainable * (4 + len(config.trained.roles) * (4 + _MOMENTS[config.optimizer.kind]))
    kept = config.cadence.keep_checkpoints + 1  # the oldest is removed after the newest was written
    others = [name for name in MODELS if name != "transformer" and (name != "text_encoder_3" or teacher.has_t5)]
    files = [path for name in others for path in find_weights(teacher.path / name).files]
    encodes = not (online or prompts.is_encoded)
    to_encode = 0 if reals is None else reals.to_encode()
    settings, size = config.evaluation, evaluated_size(config, teacher)
    references = evaluations = 0.0
    images, kind = 0, evaluator_kind(config, teacher)
    if kind != "none":
        images = evaluated_images(config, kind)
        cost = evaluation_cost(geometry, size, teacher_sampling(config), images, encodes=kind != "clip")
        evaluations = -(-left // config.cadence.evaluate) * cost.evaluation / rate
    if kind == "reference":
        references = cost.references / rate
        if prompts.is_encoded and (made := run_references(config, teacher, out, prompts.first(settings.images))):
            references *= len(made.missing()) / len(list(made.batches()))
    own = references_folder(config, out).parent == out and kind == "reference"
    return RunEstimate(
        prompts=count,
        real_images=to_encode,
        prompt_bytes=row,
        is_online=online,
        cache=count * row * encodes,
        image_cache=to_encode * _image_bytes(row, teacher.latent_shape),
        checkpoints=kept * state + 2 * 4 * trainable,  # and the best student
        student=2 * teacher.parameters + sum(path.stat().st_size for path in files),
        references=reference_bytes(settings.images, size) * own,
        known_prompts=row * (GRID + images),
        prompt_flop=prompt_flop,
        image_flop=image_flop,
        encoding_seconds=(count * prompt_flop * encodes + _images_flop(geometry, to_encode)) / rate,
        training_seconds=training,
        reference_seconds=references,
        evaluation_seconds=evaluations,
    )


def estimate_plan(config: RunConfig, setting: PlanInput, plan: Plan, flop_rate: float) -> RunEstimate:
    """Estimate a run from its plan, at a rate in FLOP/s, with as many distinct prompts as it takes at most.

    The evaluator `auto` is planned as `reference`.
    """
    evaluation, cadence = config.evaluation, config.cadence
    prompts, images = config.prompts.max_count, config.images
    geometry = setting.geometry
    row, online = setting.prompt_bytes, setting.online
    reals = 0 if config.real is None else config.real.max_count or 0  # a run counts its source
    channels, side = (int(geometry.transformer[name]) for name in ("in_channels", "sample_size"))
    prompt_flop = encoding_flop(geometry)
    size = (setting.size, setting.size)
    by_clip, made = evaluation.evaluator == "clip", evaluation.evaluator not in ("clip", "none")
    count = evaluation.images if by_clip else image_count(evaluation.images)
    sampling = Sampling(evaluation.teacher_steps, setting.method.guidance)
    cost = evaluation_cost(geometry, size, sampling, count, encodes=not by_clip)
    evaluations = 0 if evaluation.evaluator == "none" else -(-images // cadence.evaluate)
    weights = sum(plan.resident[f"{part} weights"] for part in ("student", "fake"))
    average = plan.resident["averaged student"]
    state = average + weights + plan.optimizer_states[setting.optimizer]
    return RunEstimate(
        prompts=prompts,
        real_images=reals,
        prompt_bytes=row,
        is_online=online,
        cache=0 if online else prompts * row,
        image_cache=reals * _image_bytes(row, (channels, side, side)),
        checkpoints=(cadence.keep_checkpoints + 1) * state + 2 * average,
        student=2 * (plan.parameters + geometry.text_parameters) + plan.resident["autoencoder for grids"],
        references=reference_bytes(evaluation.images, size) * made,
        known_prompts=row * (GRID + (0 if evaluation.evaluator == "none" else count)),
        prompt_flop=prompt_flop,
        image_flop=plan.flop_per_image,
        encoding_seconds=(prompts * prompt_flop * (not online) + _images_flop(geometry, reals)) / flop_rate,
        training_seconds=images * (plan.flop_per_image + prompt_flop * online) / flop_rate,
        reference_seconds=cost.references / flop_rate * made,
        evaluation_seconds=evaluations * cost.evaluation / flop_rate,
    )


def reference_bytes(images: int, size: tuple[int, int]) -> int:
    """Bytes of the teacher's images for so many prompts, of (width, height) pixels that PNG does not compress."""
    return image_count(images) * 3 * size[0] * size[1]


def _image_bytes(caption: int, latent_shape: tuple[int, int, int]) -> int:
    """Bytes of a real image in a cache: its latents in fp32, and its caption."""
    return caption + torch.float32.itemsize * math.prod(latent_shape)


def _images_flop(geometry: Geometry, count: int) -> float:
    """FLOP of encoding `count` real images, at the teacher's native size, and their captions."""
    size = geometry.image_size, geometry.image_size
    return count * (encoding_flop(geometry) + autoencoder_cost(geometry, size).encoding) if count else 0.0


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure FLOP/s of a matrix product on a device, in milliseconds."""
    side = 8192 if device.type == "cuda" else 512
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        b = a @ a
        float(b[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return float(2 * side**3 / best)
