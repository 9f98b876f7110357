"""Prompts of the toy dataset: GenEval's six tasks, their wordings, and the held-out split.

A *combination* is the content of a prompt without its wording: the relation, and shape and color of each object. One
combination in eight, chosen by a hash, is held out: training sees neither it nor a prompt that adds colors to it.
Training sees every shape, color and relation in other combinations.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import Literal, get_args

import numpy as np

from distill.worlds.scenes.shapes import COLORS, SHAPES

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]  # GenEval's names
TASKS: tuple[Task, ...] = get_args(Task)
RELATIONS = ("left", "right", "above", "below")
_MIRRORED = {"right": "left", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}

_OPENINGS = ("", "a photo of ", "a picture of ")
_RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}
_JOINING_WORDS = ("and", "with", "next to")


@dataclass(frozen=True)
class Thing:
    """An object that a prompt names; `color` is None if the prompt names none."""

    shape: str
    color: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What an image must show for GenEval's verdict to be positive.

    `things` are the one or two objects. `count` is how often a single object appears. `relation` is the position of the
    first object relative to the second.
    """

    task: str
    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None

    def combination(self, colors: bool = True) -> str:
        """Return the key of the held-out split."""
        names = [f"{t.color if colors else None} {t.shape}" for t in self.things]
        relation = self.relation or ("and" if len(names) == 2 else "coloured" if self.task == "colors" else "alone")
        if relation in _MIRRORED:  # "a right of b" is "b left of a"
            relation, names = _MIRRORED[relation], names[::-1]
        elif relation == "and":  # "a and b" is "b and a"
            names.sort()
        return " ".join([relation, str(self.count), *names])

    @property
    def held_out(self) -> bool:
        """Whether the prompt is held out: its combination, or the same without colors, is held out."""
        keys = {self.combination()}
        if self.task != "colors":  # holding out "a heart" must not hold out all colors of it
            keys.add(self.combination(colors=False))
        return any(_is_held_out(key) for key in keys)


def _is_held_out(combination: str) -> bool:
    return hashlib.blake2b(b"held-out 65 " + combination.encode(), digest_size=1).digest()[0] % 8 == 0


def all_prompts(task: str) -> Iterator[Prompt]:
    """Yield every combination of a task. As in GenEval, only the tasks about colors name colors."""
    things = [Thing(shape) for shape in SHAPES]
    colored = [Thing(shape, color) for shape, color in product(SHAPES, COLORS)]
    match task:
        case "single_object":
            yield from (Prompt(task, (thing,)) for thing in things)
        case "two_object":
            yield from (Prompt(task, pair) for pair in combinations(things, 2))
        case "counting":
            yield from (Prompt(task, (thing,), count) for thing, count in product(things, NUMBERS))
        case "colors":
            yield from (Prompt(task, (thing,)) for thing in colored)
        case "position":
            for pair, relation in product(permutations(things, 2), RELATIONS):
                yield Prompt(task, pair, relation=relation)
        case "color_attr":
            for a, b in combinations(colored, 2):
                if a.shape != b.shape and a.color != b.color:
                    yield Prompt(task, (a, b))
        case _:
            raise ValueError(f"no task {task!r}; the tasks are {', '.join(TASKS)}")


def evaluation_prompts(per_task: int, seed: int, held_out: bool = True) -> list[Prompt]:
    """Draw `per_task` prompts of each task from one split, held out or seen; combinations are drawn equally often."""
    rng = np.random.default_rng(seed)
    chosen: list[Prompt] = []
    for task in TASKS:
        pool = [prompt for prompt in all_prompts(task) if prompt.held_out is held_out]
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-per_task // len(pool)))])
        chosen += [pool[i] for i in order[:per_task]]
    return chosen


def sample_prompt(rng: np.random.Generator, task_weights: Mapping[Task, float] | None = None) -> Prompt:
    """Draw a training prompt. Half of the counting and position prompts name colors.

    `task_weights` are the shares of the tasks. Without them tasks are drawn uniformly before held-out prompts are
    rejected, so that tasks with more held-out combinations are slightly rarer.
    """
    task = None
    if task_weights is not None:
        task = TASKS[rng.choice(len(TASKS), p=[task_weights[task] for task in TASKS])]
    while True:
        prompt = _sample_unfiltered(rng, task)
        if not prompt.held_out:
            return prompt


def _sample_unfiltered(rng: np.random.Generator, task: str | None) -> Prompt:
    task = task or TASKS[rng.integers(len(TASKS))]
    names = rng.choice(len(SHAPES), 2, replace=False)
    colors = rng.choice(len(COLORS), 2, replace=False)
    colored = task in ("colors", "color_attr") or (task in ("counting", "position") and rng.random() < 0.5)
    a, b = (Thing(SHAPES[s], COLORS[c] if colored else None) for s, c in zip(names, colors, strict=True))
    match task:
        case "single_object" | "colors":
            return Prompt(task, (a,))
        case "counting":
            return Prompt(task, (a,), count=int(rng.integers(2, 5)))
        case "position":
            return Prompt(task, (a, b), relation=RELATIONS[rng.integers(4)])
        case _:
            return Prompt(task, (a, b))


def wording(prompt: Prompt, rng: np.random.Generator) -> str:
    """Draw a wording of a prompt, such as "a photo of a red circle to the left of a blue star"."""

    def pick(choices: tuple[str, ...]) -> str:
        return choices[rng.integers(len(choices))]

    opening = pick(_OPENINGS)
    first = prompt.things[0]
    if prompt.count > 1:
        return f"{opening}{NUMBERS[prompt.count]} {_name(first, plural=True)}"
    if len(prompt.things) == 1:
        return opening + _with_article(first)
    joint = pick(_RELATION_WORDS[prompt.relation] if prompt.relation else _JOINING_WORDS)
    return f"{opening}{_with_article(first)} {joint} {_with_article(prompt.things[1])}"


def _name(thing: Thing, plural: bool = False) -> str:
    ending = ("es" if thing.shape.endswith("s") else "s") if plural else ""
    return f"{thing.color} {thing.shape}{ending}" if thing.color else thing.shape + ending


def _with_article(thing: Thing) -> str:
    name = _name(thing)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def training_prompts(count: int, seed: int, task_weights: Mapping[Task, float] | None = None) -> list[str]:
    """Draw `count` training prompts, each in one wording; `task_weights` as in `sample_prompt`."""
    rng = np.random.default_rng(seed)
    return [wording(sample_prompt(rng, task_weights), rng) for _ in range(count)]


def vocabulary() -> list[str]:
    """Return every word of all wordings."""
    plain = " ".join([*_OPENINGS, *_JOINING_WORDS, *sum(_RELATION_WORDS.values(), ()), "a an"])
    plurals = [_name(Thing(shape), plural=True) for shape in SHAPES]
    return sorted({*plain.split(), *NUMBERS.values(), *SHAPES, *plurals, *COLORS})
