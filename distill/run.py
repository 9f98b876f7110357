"""One distillation from configuration to student folder; what `distill run` and jobs call.

The run folder: `config.yaml` (resolved), `embeddings/`, `images/` (real ones, for methods that take them),
`sources.json` (digests of what was encoded), `checkpoints/`, `best/` (the averaged student that judged best so far),
`metrics.jsonl`, `tensorboard/`, `samples/`, and at the end `student/`. The same call continues a run.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from distill.config import Lora, Prompts, RealImages, RunConfig, load_config
from distill.data import image_cache
from distill.data.embedding_cache import (
    MANIFEST,
    EmbeddingCache,
    EmbedProgress,
    cached_prompts,
    check_prompts,
    embed_prompts,
)
from distill.data.image_cache import EncodeProgress, ImageCache, check_examples, encode_examples
from distill.data.images import read_examples
from distill.data.prompts import read_prompts
from distill.data.sources import PROMPT_SOURCES, TEACHERS
from distill.errors import CheckpointError, ConfigError, OutputError, RunError, TeacherError
from distill.evaluate.base import EvalPrompts, Evaluator, Generate, Images, evaluate, find_evaluator
from distill.files import atomic_write_text
from distill.flow import noise
from distill.models.device import fast_bfloat16
from distill.models.sd3 import check_parts, decode_in_parts, encode_images, load_vae
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.models.vae import to_images, to_pixels
from distill.philox import key_of
from distill.report.alarms import Alarms
from distill.report.grid import labeled_grid, save_png
from distill.report.run_folder import ALARMS, EVALUATIONS, METRICS, ended_early, holds_student, read_run
from distill.student.export import SHARD_SIZE, check_place, export_student
from distill.training import checkpoint
from distill.training.networks import build
from distill.training.start import check_start
from distill.training.trainer import Progress, accelerator_for, check, mesh, train

with suppress(ImportError):  # the folder of toy datasets may be deleted
    from distill import worlds  # noqa: F401  registers their sources

SOURCES = "sources.json"  # digests of the prompts and real images that a run learns from
SPEED = "speed.json"  # what `distill.training.speed` measured
GRID = 16  # images in a sample grid
_log = logging.getLogger(__name__)
JUDGED = 16  # prompts of each task that a student is judged on while it is trained
_OWN = ("checkpoints", "best", "student", "samples", SOURCES, METRICS, EVALUATIONS, ALARMS)  # rewritten by a run


def read_teacher(config: RunConfig) -> SD3Folder:
    """Read and check the folder that `teacher` names: a built-in teacher or a path."""
    return SD3Folder.read(TEACHERS.get(config.teacher, config.teacher))


def prepare(config: RunConfig, out: Path, teacher: SD3Folder) -> None:
    """Write the resolved configuration, before anything is computed. Raises what `check_run` raises."""
    check_run(config, out, teacher)
    kept = out / "config.yaml"
    if kept.exists():
        before = read_config(out)
        if (before.teacher, before.identity()) != (config.teacher, config.identity()):
            (out / SPEED).unlink(missing_ok=True)  # it was measured with the other configuration
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(kept, yaml.safe_dump(config.as_dict(), sort_keys=False))


def check_run(config: RunConfig, out: Path, teacher: SD3Folder) -> None:
    """Check the teacher's weights, start, sources and the run folder; nothing is written.

    Raises TeacherError, SizeError, ConfigError for `early_stopping_patience` without evaluations, CheckpointError if
    `out` holds a run of another configuration, and OutputError if a run would replace files there that belong to no
    run.
    """
    latent_shapes(config, teacher)
    _check_patience(config, teacher)
    kept = out / "config.yaml"
    if kept.exists():
        before = read_config(out)
        if has_learnt(out):
            config.check_same(before.identity(), kept)
            check_teacher(out, teacher)
    else:
        for name in _OWN:
            if (out / name).exists():
                raise OutputError(f"{out} holds {name}, but no config.yaml of a run; give another --out")
    check_place(out / "student", teacher.path)
    if not has_learnt(out):
        check_parts(teacher)
        check_start(config, teacher)
        _check_sources(config, teacher)


def check_teacher(out: Path, teacher: SD3Folder) -> None:
    """Raise CheckpointError if the run in `out` has learnt from a teacher with another digest."""
    path = out / SOURCES
    try:
        kept = json.loads(path.read_text())["teacher"] if path.exists() else teacher.digest
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say what the run learns from ({error}); give another --out") from None
    if kept != teacher.digest:
        raise CheckpointError(
            f"{out} was trained from another teacher than {teacher.path}; give the current path of its own teacher, or "
            "another --out"
        )


def _check_sources(config: RunConfig, teacher: SD3Folder) -> None:
    """Open caches, or read the first prompt and real image of other sources, to find errors before anything is made.

    Raises CacheError, PromptError, ImageError, or ConfigError for a column of a cache.
    """
    prompts, real = config.prompts, config.real
    if _is_cache(prompts, MANIFEST):
        EmbeddingCache(Path(prompts.source), teacher)
    elif _may_be_read_twice(prompts.source):
        next(iter(read_prompts(prompts.source, prompts.max_count, prompts.seed, prompts.column)), None)
    if real is not None and _is_cache(real, image_cache.MANIFEST):
        ImageCache(Path(real.source), teacher)
    elif real is not None and _may_be_read_twice(real.source):
        next(iter(read_examples(real.source, real.max_count, real.seed, real.column)), None)


def _is_cache(given: Prompts | RealImages, manifest: str) -> bool:
    """Whether a source is a cache. Raises ConfigError if a column is given for a cache."""
    if not (Path(given.source) / manifest).exists():
        return False
    if given.column is not None:
        raise ConfigError(f"column {given.column!r} is named, but {given.source} is a cache; leave the column out")
    return True


def _may_be_read_twice(source: str) -> bool:
    """Whether a source is a file, a folder or missing, and not a stream."""
    path = Path(source)
    return source not in ("-", *PROMPT_SOURCES) and (path.is_file() or path.is_dir() or not path.exists())


def _is_gone(source: str, folder: Path, out: Path) -> bool:
    """Whether a run that has learnt cannot compare its source with the cache; if so, log a warning.

    This holds for standard input and for a source that was moved or removed. The cache itself is always compared.
    """
    if not has_learnt(out) or source in PROMPT_SOURCES or (source != "-" and Path(source).exists()):
        return False
    what = "standard input" if source == "-" else source
    _log.warning("%s is not read again; the run goes on with what was encoded of it in %s", what, folder)
    return True


def read_config(out: Path) -> RunConfig:
    """The configuration of a run folder. Raises CheckpointError for one that this version does not know."""
    path = out / "config.yaml"
    try:
        return load_config(str(path))
    except ConfigError as error:
        raise CheckpointError(
            f"{path} is no configuration of this version ({error}); a run of another version is not continued: "
            "give another --out"
        ) from error


def latent_shapes(config: RunConfig, teacher: SD3Folder) -> list[tuple[int, int, int]]:
    """(C, h, w) of each size that the run draws from. Raises SizeError for one that the teacher cannot make."""
    return [teacher.latent_shape_of(*size) for size in config.sizes] or [teacher.latent_shape]


def evaluator_of(config: RunConfig, teacher: SD3Folder) -> Evaluator | None:
    """The evaluator of the run's students: that of its teacher's or its prompts' name, if it fits the image size."""
    size = config.sizes[0] if config.sizes else (teacher.image_size, teacher.image_size)
    return find_evaluator((config.teacher, config.prompts.source), size)


def _check_patience(config: RunConfig, teacher: SD3Folder) -> None:
    patience = config.early_stopping_patience
    if patience is None:
        return
    if evaluator_of(config, teacher) is None:
        raise ConfigError(
            "early_stopping_patience counts evaluations, and only students of the toy dataset are evaluated; "
            "set it to null"
        )
    evaluations = config.images // config.cadence.evaluate
    if evaluations <= patience:
        _log.warning(
            "early_stopping_patience %d cannot end this run: images and cadence.evaluate make %d evaluations",
            patience,
            evaluations,
        )


def embed(config: RunConfig, out: Path, teacher: SD3Folder, device: torch.device) -> Iterator[EmbedProgress]:
    """Encode the run's prompts, unless `prompts.source` is a cache.

    Raises CacheError when the run's own cache was made of other prompts than the source holds now.
    """
    folder = embeddings_folder(config, out)
    if folder == Path(config.prompts.source):
        return
    given = config.prompts
    prompts = read_prompts(given.source, given.max_count, given.seed, given.column)
    if (folder / MANIFEST).exists():
        if not _is_gone(given.source, folder, out):
            check_prompts(teacher, prompts, folder)
    else:
        yield from embed_prompts(teacher, prompts, folder, device)


def embeddings_folder(config: RunConfig, out: Path) -> Path:
    """The folder of the prompt cache: `prompts.source` if that is a cache, else one in the run folder."""
    source = Path(config.prompts.source)
    return source if (source / MANIFEST).exists() else out / "embeddings"


def encode(config: RunConfig, out: Path, teacher: SD3Folder, device: torch.device) -> Iterator[EncodeProgress]:
    """Encode the run's real images, if it takes any, unless `real.source` is a cache.

    Raises CacheError when the run's own cache was made of other images than the source holds now.
    """
    real = config.real
    if real is None or (folder := _images_folder(real, out)) == Path(real.source):
        return
    examples = read_examples(real.source, real.max_count, real.seed, real.column)
    if (folder / image_cache.MANIFEST).exists():
        if not _is_gone(real.source, folder, out):
            check_examples(teacher, examples, folder)
    else:
        yield from encode_examples(teacher, examples, folder, device)


def check_unchanged(config: RunConfig, out: Path, teacher: SD3Folder) -> None:
    """Raise CacheError or CheckpointError if prompts or real images have changed since the run encoded or used them.

    Nothing is encoded; sources without a cache are not checked.
    """
    real = config.real
    if not (embeddings_folder(config, out) / MANIFEST).exists():
        return
    if real is not None and not (_images_folder(real, out) / image_cache.MANIFEST).exists():
        return
    list(embed(config, out, teacher, torch.device("cpu")))
    list(encode(config, out, teacher, torch.device("cpu")))
    reals = None if real is None else ImageCache(_images_folder(real, out), teacher)
    conditions = EmbeddingCache(embeddings_folder(config, out), teacher)
    _hold_to_sources(out, teacher, conditions, reals, write=False)


def _images_folder(real: RealImages, out: Path) -> Path:
    """Where the cache of real images is: `real.source`, if that is one, else in the run."""
    source = Path(real.source)
    return source if (source / image_cache.MANIFEST).exists() else out / "images"


def accelerator(config: RunConfig, out: Path) -> Accelerator:
    """Accelerate with the run's precision; `auto` is bf16 where that is the faster.

    Raises ConfigError for what this machine cannot do.
    """
    probe = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and fast_bfloat16(probe))
    machine = accelerator_for("bf16" if bf16 else "no", out, config.trackers)
    check(config, machine)
    return machine


def distill(config: RunConfig, out: Path, teacher: SD3Folder, machine: Accelerator) -> Iterator[Progress]:
    """Train to the budget with grids, judgments and checkpoints on the way; the student ends in `out/student`."""
    if _all_told(machine.is_main_process and _finished(config, out)):
        return
    conditions = EmbeddingCache(embeddings_folder(config, out), teacher, machine.device, config.prompts.max_count)
    reals = None
    if config.real is not None:
        reals = ImageCache(_images_folder(config.real, out), teacher, config.real.max_count, machine.device)
    _hold_to_sources(out, teacher, conditions, reals, machine.is_main_process)
    dtype = torch.bfloat16 if machine.mixed_precision == "bf16" else torch.float32
    # The watch first: it holds the text encoders for a moment, when no network takes up memory yet. Every process
    # looks where a sharded base needs all of them to generate; one writes.
    watch = None
    if machine.is_main_process or machine.is_fsdp2:
        watch = _Watch(config, out, teacher, machine.device, dtype, machine.is_main_process)
    torch.manual_seed(key_of(config.seed, "weights"))
    turns = config.method.turns()
    roles = tuple(sorted({turn.role for turn in turns}))
    two_times, critic = any(turn.two_times for turn in turns), any(turn.critic for turn in turns)
    networks = build(teacher, config.networks, dtype, machine.device, roles, two_times, critic, mesh(machine))

    last = None
    rounds = train(config, out, networks, conditions, latent_shapes(config, teacher), machine, reals)
    for progress in () if _all_told(watch is not None and watch.over) else rounds:
        if watch is not None:
            watch.look(progress)
        machine.wait_for_everyone()
        yield progress
        last = progress
        if progress.crosses(config.cadence.evaluate) and _all_told(watch is not None and watch.over):
            break
    if machine.is_main_process and (last is not None or not holds_student(out, config.images)):
        export(out, teacher=teacher)
    machine.wait_for_everyone()


def _hold_to_sources(
    out: Path, teacher: SD3Folder, conditions: EmbeddingCache, reals: ImageCache | None, write: bool
) -> None:
    """Record the digests of what the run learns from. Raises CheckpointError if it has learnt from something else."""
    path = out / SOURCES
    digests = {"prompts": conditions.sha256, **({"real images": reals.sha256} if reals is not None else {})}
    digests["teacher"] = teacher.digest
    if path.exists() and has_learnt(out):
        kept = json.loads(path.read_text())
        for name, digest in digests.items():
            if kept.get(name) != digest:
                raise CheckpointError(
                    f"{out} has learnt from other {name} than it is given now; restore what it was given, or give "
                    "another --out folder"
                )
    elif write:
        atomic_write_text(path, json.dumps(digests, indent=2) + "\n")


def has_learnt(out: Path) -> bool:
    """Whether a run has a checkpoint or a student, so that its configuration may no longer change."""
    return (out / "student").exists() or any(checkpoint.states(out / part) for part in ("checkpoints", "best"))


def _finished(config: RunConfig, out: Path) -> bool:
    """Whether a student is there and nothing more to be learnt, so that no model need be loaded."""
    newest = checkpoint.latest(out / "checkpoints")
    if newest is None or not holds_student(out, config.images):
        return False
    run, images = read_run(out), int(newest.name)
    kept = [line for line in run.evaluations if line["images"] <= images]  # a killed run goes back to its checkpoint
    return images >= config.images or ended_early(run.config, kept, run.best)


def _all_told(over: bool) -> bool:
    """What the main process found, in every process."""
    return bool(broadcast_object_list([over])[0])


def export(
    out: Path,
    student: Path | None = None,
    which: str = "best",
    dtype: torch.dtype = torch.float16,
    max_shard_size: str = SHARD_SIZE,
    license: str | None = None,
    teacher: SD3Folder | None = None,
) -> Path:
    """Write the student of a run folder, finished or not, to `student`, or to where the run itself leaves it.

    `which` is `best`, the averaged student that judged best, or the last where none was judged; `last`; or a number
    of images seen, of a checkpoint that is still there. `teacher` is the run's teacher, already read or moved.
    Raises RunError when there is no such checkpoint, CheckpointError for another teacher.
    """
    run = read_run(out)
    config = read_config(out)
    if teacher is None:
        try:
            teacher = read_teacher(config)
        except TeacherError as error:
            if Path(config.teacher).expanduser().exists():
                raise
            raise TeacherError(f"{error}; if it was moved, name its new place with --teacher") from None
    check_teacher(out, teacher)
    state = _state(out, which)
    weights, _ = checkpoint.load(state, "" if state.parent.name == "best" else "average")
    images = int(state.name)
    judged = next((line for line in run.evaluations if line["images"] == images), {})
    manifest = embeddings_folder(config, out) / MANIFEST
    # A published record needs no paths of this machine.
    plain, source = config.as_dict(), Path(config.prompts.source).name
    name = next((name for name, path in TEACHERS.items() if path.resolve() == teacher.path), teacher.name)
    if config.real is not None:
        plain["real"]["source"] = Path(config.real.source).name
    if config.init_from is not None:
        plain["init_from"] = config.init_from.name
    recipe = {
        "name": f"{name}-one-step",
        "method": config.method.name,
        "images_seen": images,
        "prompts": {
            "source": source,
            "count": _prompts_of(manifest),
        },
        **({"sizes": config.sizes} if config.sizes else {}),
        "metrics": {name: value for name, value in judged.items() if name != "images"},
        "config": {**plain, "teacher": name, "prompts": {**plain["prompts"], "source": source}},
    }
    return export_student(
        teacher,
        weights,
        student or out / "student",
        recipe,
        config.networks if isinstance(config.networks, Lora) else None,
        dtype,
        max_shard_size,
        license,
    )


def _prompts_of(manifest: Path) -> int | None:
    """How many prompts a cache holds; None where that cannot be read."""
    try:
        return int(json.loads(manifest.read_text())["prompts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _state(out: Path, which: str) -> Path:
    """The state that `export` means."""
    if which in ("best", "last"):
        best = checkpoint.latest(out / "best") if which == "best" else None
        found = best or checkpoint.latest(out / "checkpoints")
        if found is None:
            raise RunError(f"{out} has no checkpoint yet; `distill run` with the same --out writes one")
        return found
    kept = {int(path.name): path for part in ("checkpoints", "best") for path in checkpoint.states(out / part)}
    if not which.isdecimal() or int(which) not in kept:
        there = ", ".join(map(str, sorted(kept))) or "none"
        raise RunError(f"{out} has no checkpoint {which}; give best, last or the images of one: {there}")
    return kept[int(which)]


class _Watch:
    """Looks at the averaged student at the run's cadences: grids for people, and judgments to keep the best by.

    Judgments need a world that can be scored: the small one. Elsewhere the last average is the student. One that
    does not `write` only takes part in generating.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        teacher: SD3Folder,
        device: torch.device,
        dtype: torch.dtype,
        write: bool,
    ) -> None:
        self._config = config
        self._out = out
        self._write = write
        self._shape = latent_shapes(config, teacher)[0]
        self.over = False
        if write:
            newest = checkpoint.latest(out / "checkpoints")
            for log in (EVALUATIONS, METRICS, ALARMS):
                checkpoint.trim_lines(out / log, int(newest.name) if newest else 0)
            run = read_run(out)
            self._alarms = Alarms()
            for line in run.metrics:
                self._alarms.add(line)
            self.over = ended_early(run.config, run.evaluations, run.best)
        self._vae = load_vae(teacher, device=device)
        text = SD3TextEncoder.load(teacher, device, dtype)
        evaluator = evaluator_of(config, teacher)
        self._prompts = None if evaluator is None else evaluator.prompts(JUDGED, config.seed, held_out=False)
        # Fewer prompts than a grid has places come round again, with seeds of their own.
        few = cached_prompts(embeddings_folder(config, out), min(GRID, config.prompts.max_count))
        self._texts = list(islice(cycle(few), GRID))
        every = dict.fromkeys([*self._texts, *(self._prompts.texts if self._prompts else ())])
        self._conditions = {prompt: text.encode([prompt]) for prompt in every}

    def look(self, progress: Progress) -> None:
        """Whatever falls due."""
        if progress.metrics and self._write:
            self._heed(progress)

        @torch.no_grad()
        def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Images:
            cond = type(self._conditions[prompts[0]]).cat([self._conditions[prompt] for prompt in prompts])
            return to_images(decode_in_parts(self._vae, progress.generate(cond, noise(seeds, self._shape))))

        finished = progress.images >= self._config.images
        if progress.crosses(self._config.cadence.sample) or finished:
            images = generate(self._texts, list(range(len(self._texts))))
            if self._write:
                path = self._out / "samples" / f"{progress.images:012d}.png"
                save_png(labeled_grid([("student", images)], self._texts), path)
        if self._prompts and (progress.crosses(self._config.cadence.evaluate) or finished):
            self._evaluate(progress, self._prompts, generate)

    def _heed(self, progress: Progress) -> None:
        """Alarms of the line that was just logged."""
        for alarm in self._alarms.add({"images": progress.images, **progress.metrics}):
            progress.notes.append(f"alarm, {alarm.name}: {alarm.message}")
            with (self._out / ALARMS).open("a") as file:
                file.write(json.dumps(asdict(alarm)) + "\n")

    def _evaluate(self, progress: Progress, prompts: EvalPrompts, generate: Generate) -> None:
        encode = torch.no_grad()(lambda images: encode_images(self._vae, to_pixels(images)))
        result, _ = evaluate(prompts, generate, 1, encode, self._config.seed)
        names = ("overall", "frechet", "recall", "diversity")
        metrics: dict[str, float] = {name: getattr(result, name) for name in names}
        progress.metrics.update(metrics)
        if not self._write:
            return
        with (self._out / EVALUATIONS).open("a") as file:
            file.write(json.dumps({"images": progress.images, **metrics, **result.tasks}) + "\n")
        # A student that says the same thing well is not the best one.
        fitness = result.overall * result.diversity
        best = checkpoint.latest(self._out / "best")
        if best is None or fitness > checkpoint.load_record(best)["fitness"]:
            target = self._out / "best" / checkpoint.state_name(progress.images)
            checkpoint.save(target, progress.average, {"images": progress.images, "fitness": fitness, **metrics})
            checkpoint.prune(self._out / "best", 1)
        run = read_run(self._out)
        self.over = ended_early(run.config, run.evaluations, run.best)
        if self.over and progress.images < self._config.images:
            progress.save()
            progress.notes.append(
                f"{self._config.early_stopping_patience} evaluations found no better student than that after "
                f"{run.best['images']} images; the run ends with it, as early_stopping_patience says"
            )
