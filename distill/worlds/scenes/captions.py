"""What the world may be asked for: prompts after GenEval's six tasks, their wordings, and the held-out split.

A *combination* is what a prompt asks for, apart from its wording: the relation and the (shape, color) of each
object. One combination in eight, chosen by a hash, is held out: training sees neither it nor a prompt that says
the same and adds colors. Every shape, color and relation is seen in training, in other company.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations, product

import numpy as np

from distill.errors import ConfigError
from distill.worlds.scenes.shapes import COLORS, SHAPES

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's names
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
    """An object that a prompt names; `color` None when the prompt leaves it open."""

    shape: str
    color: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A question to the model: what must be in the image for GenEval's verdict to be yes.

    `things` are the one or two named objects, `count` how often the only one stands, `relation` where the first
    stands seen from the second.
    """

    task: str
    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None

    def combination(self, colors: bool = True) -> str:
        """The identity that the held-out split goes by."""
        names = [f"{t.color if colors else None} {t.shape}" for t in self.things]
        relation = self.relation or ("and" if len(names) == 2 else "coloured" if self.task == "colors" else "alone")
        if relation in _MIRRORED:  # "a right of b" is "b left of a"
            relation, names = _MIRRORED[relation], names[::-1]
        elif relation == "and":  # "a and b" is "b and a"
            names.sort()
        return " ".join([relation, str(self.count), *names])

    @property
    def held_out(self) -> bool:
        """Whether training must not see it: its combination, or that without the colors, is held out."""
        keys = {self.combination()}
        if self.task != "colors":  # else every color of a shape would leave training with "a heart"
            keys.add(self.combination(colors=False))
        return any(_chosen(key) for key in keys)


def _chosen(combination: str) -> bool:
    return hashlib.blake2b(b"held-out 65 " + combination.encode(), digest_size=1).digest()[0] % 8 == 0


def everything(task: str) -> Iterator[Prompt]:
    """Every combination of a task, as GenEval words it: colors only where the task is about colors."""
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
    """`per_task` prompts of each task, every combination as often as any other; held out, or seen in training."""
    rng = np.random.default_rng(seed)
    chosen: list[Prompt] = []
    for task in TASKS:
        pool = [prompt for prompt in everything(task) if prompt.held_out is held_out]
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-per_task // len(pool)))])
        chosen += [pool[i] for i in order[:per_task]]
    return chosen


def parse_task_weights(text: str | None) -> dict[str, float]:
    """Shares of the tasks, which sum to 1, from text such as "counting=2,position=1"; equal ones from None.

    A task that the text does not name has no share. Raises ConfigError for text of another form.
    """
    if text is None:
        return dict.fromkeys(TASKS, 1 / len(TASKS))
    weights = dict.fromkeys(TASKS, 0.0)
    for part in text.split(","):
        task, _, number = (word.strip() for word in part.partition("="))
        if task not in weights:
            raise ConfigError(f"--task-weights: there is no task {task!r}; the tasks are {', '.join(TASKS)}")
        try:
            weights[task] = float(number)
        except ValueError:
            raise ConfigError(f"--task-weights: {part!r} is not task=number") from None
        if not 0 <= weights[task] < math.inf:
            raise ConfigError(f"--task-weights: {part!r} is negative or not finite; give 0 or more")
    total = math.fsum(weights.values())
    if total == 0:
        raise ConfigError("--task-weights: all are 0; give at least one task a positive number")
    return {task: weight / total for task, weight in weights.items()}


def sample_prompt(rng: np.random.Generator, task_weights: Mapping[str, float] | None = None) -> Prompt:
    """A prompt for training; counting and position name the colors half of the time.

    `task_weights` are the tasks' shares. Without them all tasks are drawn alike, but those with more held-out
    combinations are a little rarer.
    """
    task = None
    if task_weights is not None:
        task = TASKS[rng.choice(len(TASKS), p=[task_weights[task] for task in TASKS])]
    while True:
        prompt = _sample_any(rng, task)
        if not prompt.held_out:
            return prompt


def _sample_any(rng: np.random.Generator, task: str | None) -> Prompt:
    task = task or TASKS[rng.integers(len(TASKS))]
    names = rng.choice(len(SHAPES), 2, replace=False)
    tints = rng.choice(len(COLORS), 2, replace=False)
    colored = task in ("colors", "color_attr") or (task in ("counting", "position") and rng.random() < 0.5)
    a, b = (Thing(SHAPES[s], COLORS[c] if colored else None) for s, c in zip(names, tints, strict=True))
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
    """One of the phrasings of a prompt: "a photo of a red circle to the left of a blue star"."""

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


def training_prompts(count: int, seed: int) -> list[str]:
    """`count` worded prompts that training may see."""
    rng = np.random.default_rng(seed)
    return [wording(sample_prompt(rng), rng) for _ in range(count)]


def vocabulary() -> list[str]:
    """Every word that a wording can hold."""
    plain = " ".join([*_OPENINGS, *_JOINING_WORDS, *sum(_RELATION_WORDS.values(), ()), "a an"])
    plurals = [_name(Thing(shape), plural=True) for shape in SHAPES]
    return sorted({*plain.split(), *NUMBERS.values(), *SHAPES, *plurals, *COLORS})
