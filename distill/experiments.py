"""Several distillations of one teacher on equal terms: what `distill compare` plans, measures and writes.

Each variant is an ordinary run in a folder of its own under the comparison's, so a comparison continues where it
stopped, and a run that is finished is not done again.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from distill import methods, run
from distill.config import RunConfig, load_config
from distill.data.embedding_cache import cached_prompts
from distill.errors import ConfigError, RunError
from distill.evaluate.base import FEATURES, EvalPrompts, EvalResult
from distill.evaluate.sampler import Setting, TeacherSampler
from distill.evaluate.side_by_side import Comparison, cell, figure_names
from distill.files import atomic_write_text, check_replaceable
from distill.models.sd3_folder import SD3Folder
from distill.pipeline import OneStepPipeline, read_student
from distill.report.picture import labeled_grid, save_png
from distill.report.run_folder import read_run
from distill.training import checkpoint
from distill.training.speed import images_within
from distill.worlds.scenes.render import SIZE

SHOWN = 8  # prompts of the picture where there is no scorer


@dataclass(frozen=True)
class Variant:
    """One of the runs compared; `name` is what the command was given, and the name of its folder.

    `config` is that of a preset or file with overrides.
    """

    name: str
    config: RunConfig
    source: str
    overrides: tuple[str, ...]

    def command(self, out: Path) -> str:
        """The run by itself, in its folder of the comparison in `out`."""
        sets = (*self.overrides, f"images={self.config.images}")
        words = ["distill", "run", self.source, *(part for each in sets for part in ("--set", each))]
        return shlex.join([*words, "--out", str(out / self.name)])


def read_variants(texts: Sequence[str], base: str, overrides: Sequence[str], images: int | None) -> list[Variant]:
    """Variants from `METHOD_OR_FILE,key=value,...`: a method in place of the base's own, or a YAML file.

    A method takes everything else from the base, its guidance included, which goes with the teacher. `overrides` hold
    for all, a variant's own keys come after them, and all have the images of the base when none are given.
    Raises ConfigError for one that is no configuration, named twice, or not comparable with the first.
    """
    budget = f"images={load_config(base, overrides).images if images is None else images}"
    variants: list[Variant] = []
    for text in texts:
        head, *own = re.split(r",(?![^\[{]*[\]}])", text)  # commas inside of brackets belong to a value
        if head in methods.names():
            source, sets = base, (f"method.name={head}", *overrides, *own)
        elif head.endswith((".yaml", ".yml")):
            source, sets = head, (*overrides, *own)
        else:
            raise ConfigError(f"no method {head!r}; there are {', '.join(methods.names())}, or give a YAML file")
        name = ",".join([Path(head).stem, *own]).replace("/", "-")
        if name in {variant.name for variant in variants}:
            raise ConfigError(
                f"two variants are called {name!r}; give one of them another file name or a key of its own"
            )
        config = load_config(source, [*sets, budget])
        if head in methods.names() and config.method.name != head:
            raise ConfigError(
                f"{text} is set to the method {config.method.name}; give that name as the variant, or leave the key out"
            )
        variants.append(Variant(name, config, source, sets))
    for field in ("teacher", "precision"):
        values = {variant.name: getattr(variant.config, field) for variant in variants}
        if len(set(values.values())) > 1:
            raise ConfigError(f"{field} differs between variants ({values}); a comparison has one, set it with --set")
    return variants


def check_folder(out: Path) -> None:
    """Raise OutputError if a comparison's own output would replace a file of another program."""
    for name in ("compare.json", "compare.md"):
        check_replaceable(out / name, "distill compare")
    check_replaceable(out / "compare.png")


def share_embeddings(variant: Variant, variants: Sequence[Variant], out: Path) -> None:
    """Let a run use the embeddings of the first variant that has the same prompts."""
    alike = (each.name for each in variants if each.config.prompts == variant.config.prompts)
    owner = next((name for name in alike if not (out / name).is_file()), variant.name)
    link = out / variant.name / "embeddings"
    encodes = run.embeddings_folder(variant.config, link.parent) == link
    if encodes and owner != variant.name and not os.path.lexists(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        (out / owner / "embeddings").mkdir(parents=True, exist_ok=True)  # the owner's run may have failed before this
        link.symlink_to(Path("..") / owner / "embeddings")


def is_finished(variant: Variant, out: Path, teacher: SD3Folder) -> bool:
    """Whether its run lies there whole: of this configuration, to this budget, with its student.

    Raises ConfigError when the run has gone beyond the budget, which would favor it.
    """
    folder, config = out / variant.name, variant.config
    try:
        found = read_run(folder)
    except RunError:
        return False
    if found.images >= config.images + config.batch:  # a run ends with a whole batch
        raise ConfigError(
            f"{folder} has seen {found.images} images, more than the {config.images} of this comparison; "
            "give them all as many, or another --out"
        )
    run.check_teacher(folder, teacher)
    return (
        run.read_config(folder).identity() == config.identity()
        and found.state == "finished"
        and found.images >= config.images
    )


def within(seconds: float, variant: Variant, out: Path, teacher: SD3Folder) -> Variant:
    """The variant with as many images as its training makes in so many seconds."""
    images = images_within(seconds, variant.config, out / variant.name, teacher)
    return replace(variant, config=variant.config.model_copy(update={"images": images}))


@dataclass(frozen=True)
class Cost:
    """What a run took: images, seconds of training, and the images that the exported student had seen."""

    images: int
    seconds: float
    kept: int


def read_cost(folder: Path) -> Cost:
    """The cost of a finished run. Raises RunError when its checkpoints are gone."""
    newest = checkpoint.latest(folder / "checkpoints")
    if newest is None:
        raise RunError(f"{folder} holds no checkpoint, so its seconds are not known; remove it to run it again")
    record = checkpoint.load_record(newest)
    return Cost(int(record["images"]), float(record.get("seconds", 0)), read_student(folder / "student").images_seen)


@dataclass(frozen=True)
class Outcome:
    """Commands and costs of the runs, metrics of teacher and students where there is a scorer, and their images.

    `diverged` and `failed` give the reasons for runs without a student.
    """

    commands: dict[str, str]
    costs: dict[str, Cost]
    teacher: EvalResult | None
    students: dict[str, EvalResult]
    picture: Image
    diverged: Mapping[str, str]
    failed: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `teacher`, `runs`, and `diverged` and `failed` where there are any."""
        metrics = {name: judgment.as_dict() for name, judgment in self.students.items()}
        runs = {
            name: {"command": self.commands[name], **asdict(cost), **metrics.get(name, {})}
            for name, cost in self.costs.items()
        }
        measure = {"features": FEATURES, "teacher": self.teacher.as_dict()} if self.teacher else {}
        without = {"diverged": dict(self.diverged), "failed": dict(self.failed)}
        return {**measure, "runs": runs, **{how: why for how, why in without.items() if why}}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines: the teacher, then each run with what it took."""
        names = figure_names(self.teacher) if self.teacher else []
        lines = [["teacher", "-", "-", "-", *(cell(self.teacher, name) for name in names)]] if self.teacher else []
        for name, cost in self.costs.items():
            took = [str(cost.images), f"{cost.seconds:.0f}", str(cost.kept)]
            lines.append([name, *took, *(cell(self.students[name], figure) for figure in names)])
        for how, without in (("diverged", self.diverged), ("failed", self.failed)):
            lines += [[name, how, *["-"] * (2 + len(names))] for name in without]
        return ["", "images", "seconds", "kept", *names], lines

    def save(self, out: Path, record: Mapping[str, Any]) -> None:
        """`compare.json`, `compare.md` and `compare.png`; `record` says what was compared and with which command."""
        values = json.dumps({**record, **self.as_dict()}, indent=2)
        atomic_write_text(out / "compare.json", values + "\n")
        header, lines = self.table()
        rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
        text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        text += "\n`kept`: the images that the exported student had seen.\n"
        if self.teacher:
            text += f"±: half of a 95 % interval over prompts. Distances: to true scenes, on features {FEATURES}.\n"
        for how, without in (("diverged", self.diverged), ("failed", self.failed)):
            text += "".join(f"\n{name} {how}: {why}.\n" for name, why in without.items())
        text += f"\n```sh\n{record['command']}\n```\n\nEach run by itself:\n\n```sh\n"
        text += "".join(f"{command}\n" for command in self.commands.values())
        atomic_write_text(out / "compare.md", f"{text}```\n")
        save_png(self.picture, out / "compare.png")


def is_scored(config: RunConfig) -> bool:
    """Whether there is a scorer for what a run makes: the small world's."""
    return config.prompts.source == "scenes" and run.read_teacher(config).image_size == SIZE


def judged(
    variants: Sequence[Variant],
    out: Path,
    questions: EvalPrompts,
    steps: int,
    seed: int,
    device: torch.device,
    report: Callable[[int], None],
    diverged: Mapping[str, str] = MappingProxyType({}),
    failed: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """Teacher and students on the same questions and seeds; without a scorer only a picture of the first prompts.

    `diverged` and `failed` give the reasons for runs without a student, by name; they are copied to the outcome.
    """
    config = variants[0].config
    teacher = run.read_teacher(config)
    students = {variant.name: out / variant.name / "student" for variant in variants}
    commands = {variant.name: variant.command(out) for variant in variants}
    costs = {variant.name: read_cost(out / variant.name) for variant in variants}
    if is_scored(config):
        result = Comparison(teacher, students, [(steps, None)], device).run(questions, seed, report)
        metrics = {name: answers.result for name, answers in result.students.items()}
        return Outcome(commands, costs, result.teacher, metrics, result.picture(), diverged, failed)

    first = cached_prompts(run.embeddings_folder(config, out / variants[0].name), min(SHOWN, config.prompts.max_count))
    texts = list(islice(cycle(first), SHOWN))
    seeds = range(seed, seed + len(texts))
    sampler = TeacherSampler(teacher, device)
    setting = Setting(steps, sampler.folder.guidance)
    alone = [sampler.generate(setting, [text], [own]) for text, own in zip(texts, seeds, strict=True)]
    rows = [(f"teacher, {setting.nfe} NFE", np.concatenate(alone))]
    del sampler  # one model in memory at a time
    for name, folder in students.items():
        rows.append((f"{name}, 1 NFE", np.asarray(OneStepPipeline.load(folder, device)(texts, seeds))))
    return Outcome(commands, costs, None, {}, labeled_grid(rows, texts), diverged, failed)
