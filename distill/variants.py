"""The variants of an experiment, read and checked without PyTorch."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill import methods
from distill.config import RunConfig, load_config
from distill.errors import ConfigError
from distill.files import check_replaceable
from distill.training.run_teacher import PINS, pin_teachers, write_pins

NOTE = "`exported`: images seen by the exported student."  # below the table
_COMPARED = re.compile(rb'\{\s*"command": "distill compare ')  # the beginning of compare.json
_TABLE = re.compile(rb"\|  \|.*\n\n" + re.escape(NOTE.encode()), re.DOTALL)  # that of compare.md


@dataclass(frozen=True)
class Variant:
    """One of the compared runs, named by its argument and folder; `config` is that of `source`, with `overrides`."""

    name: str
    config: RunConfig
    source: str
    overrides: tuple[str, ...]

    def command(self, out: Path) -> str:
        """The `distill run` command of the variant alone, for the experiment in `out`."""
        sets = (*self.overrides, f"images={self.config.images}")
        words = ["distill", "run", self.source, *(part for each in sets for part in ("--set", each))]
        return shlex.join([*words, "--out", str(out / self.name)])


def read_variants(texts: Sequence[str], base: str, overrides: Sequence[str], images: int | None) -> list[Variant]:
    """Read variants from `METHOD_OR_FILE,key=value,...`: a method that replaces the base's, or a YAML file.

    A method keeps all other settings of the base, including guidance, which belongs to the teacher. `overrides` apply
    to all variants; a variant's own keys take precedence. The budget is `images`, or that of the base.
    Raises ConfigError for an invalid or repeated variant, and for one that is not comparable with the first.
    """
    budget = f"images={load_config(base, overrides).images if images is None else images}"
    variants: list[Variant] = []
    for text in texts:
        head, *own = re.split(r",(?![^\[{]*[\]}])", text)  # commas inside brackets belong to a value
        if head in methods.names():
            source, sets = base, (f"method.name={head}", *overrides, *own)
        elif head.endswith((".yaml", ".yml")):
            source, sets = head, (*overrides, *own)
        else:
            raise ConfigError(f"no method {head!r}; there are {', '.join(methods.names())}, or give a YAML file")
        name = ",".join([Path(head).stem, *own]).replace("/", "-")
        if name in {variant.name for variant in variants}:
            raise ConfigError(f"two variants are named {name!r}; rename a file or add a key to one of them")
        config = load_config(source, [*sets, budget])
        if head in methods.names() and config.method.name != head:
            raise ConfigError(
                f"{text} sets the method {config.method.name}; name that method as the variant, or remove the key"
            )
        variants.append(Variant(name, config, source, sets))
    for key in ("teacher", "teacher_base", "precision"):
        values = {variant.name: getattr(variant.config, key) for variant in variants}
        if len(set(values.values())) > 1:
            raise ConfigError(f"{key} differs between variants ({values}); set one value for all with --set")
    return variants


def pin_variants(variants: Sequence[Variant], out: Path) -> list[Variant]:
    """Name the commits of models of the hub that the experiment in `out` began with, in all variants."""
    first = variants[0].config
    pins = pin_teachers(first, out)
    if not (out / PINS).exists():
        write_pins(out, pins)
    named = {"teacher": first.teacher, "teacher_base": first.teacher_base}
    changed = {key: pins[value] for key, value in named.items() if value is not None and pins[value] != value}
    sets = [f"{key}={value}" for key, value in changed.items()]
    return [
        replace(each, config=each.config.model_copy(update=changed), overrides=(*each.overrides, *sets))
        for each in variants
    ]


def check_folder(out: Path) -> None:
    """Raise OutputError if the output would replace a file of another program."""
    check_replaceable(out / "compare.json", _COMPARED)
    check_replaceable(out / "compare.md", _TABLE)
    check_replaceable(out / "compare.png")
