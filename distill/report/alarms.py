"""What a run's metrics say when it goes wrong, in one sentence each with what to try. No torch.

A rule looks at means of the last WINDOW lines of the log, and at the lowest and highest such means so far; it is a
pure function of the three. An alarm is raised once, by the first line at which its rule holds.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Metrics = dict[str, float]
Rule = Callable[[Metrics, Metrics, Metrics], str | None]  # now, lowest, highest -> what to say

WINDOW = 3  # lines of the log
COLLAPSED = 0.5  # of the highest diversity so far
OVERSATURATED = 0.1  # of the latents' numbers; healthy runs stay below 0.05
STALLED = 2.0  # times the lowest error of the fake so far
TOO_FAST = 0.05  # |update| / |weights| of one round; healthy runs stay below 0.01


@dataclass(frozen=True)
class Alarm:
    """`name` of the rule, images seen when it first held, and what to tell people."""

    name: str
    images: int
    says: str


class Alarms:
    """A run's log, line by line."""

    def __init__(self) -> None:
        self._recent: deque[Metrics] = deque(maxlen=WINDOW)
        self._lowest: Metrics = {}
        self._highest: Metrics = {}
        self._raised: set[str] = set()

    def see(self, line: Metrics) -> list[Alarm]:
        """The alarms that this line, the next of the log, raises."""
        self._recent.append(line)
        if len(self._recent) < WINDOW:
            return []
        names = {name for each in self._recent for name in each}
        now = {name: _mean([each[name] for each in self._recent if name in each]) for name in names}
        now |= _relative_error(now)
        for name, value in now.items():
            self._lowest[name] = min(value, self._lowest.get(name, value))
            self._highest[name] = max(value, self._highest.get(name, value))
        raised = []
        for name, rule in RULES.items():
            says = None if name in self._raised else rule(now, self._lowest, self._highest)
            if says is not None:
                self._raised.add(name)
                raised.append(Alarm(name, int(line["images"]), says))
        return raised


def alarms(history: Iterable[Metrics]) -> list[Alarm]:
    """Every alarm of a log."""
    seen = Alarms()
    return [alarm for line in history for alarm in seen.see(line)]


def collapse(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """Images of a batch grow alike. Diversity rises from a blurred start, so its highest so far is the mark."""
    diversity, most = now.get("latent/diversity"), highest.get("latent/diversity", 0.0)
    if diversity is None or diversity >= COLLAPSED * most:
        return None
    return (
        f"the images of a batch differ by {diversity:.2g} where it was {most:.2g}: the student collapses; "
        "lower optimizer.student_lr, raise method.fake_steps, or lower the teacher's guidance"
    )


def oversaturation(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """Latents run out of the range that the autoencoder knows."""
    share = now.get("latent/saturated")
    if share is None or share <= OVERSATURATED:
        return None
    return (
        f"{share:.0%} of the student's latents are beyond three standard deviations: its images over-saturate; "
        "lower the teacher's guidance or optimizer.student_lr, or raise batch"
    )


def stalled_fake(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """The fake loses the student, or never knew it: the student then learns from a wrong field."""
    error, least = now.get(_FAKE), lowest.get(_FAKE, 0.0)
    if error is None or error <= STALLED * least:
        return None
    return (
        f"the fake's error is {error:.2g} of what no answer at all would have, and was {least:.2g}: "
        "it does not keep up with the student; raise method.fake_steps or optimizer.fake_lr, "
        "or lower optimizer.student_lr"
    )


def too_fast(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """Steps so large that they undo what the teacher's weights know."""
    found = {role: now.get(f"update_ratio/{role}", 0.0) for role in ("student", "fake")}
    role = max(found, key=found.__getitem__)
    if found[role] <= TOO_FAST:
        return None
    return f"one round moves the {role}'s weights by {found[role]:.1%} of their size; lower optimizer.{role}_lr"


def not_finite(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """Steps are being passed over; `optimizer.max_skipped_steps` of them in a row end the run."""
    found = {role: now.get(f"skipped/{role}", 0.0) for role in ("student", "fake")}
    role = max(found, key=found.__getitem__)
    if not found[role]:
        return None
    return (
        f"{found[role]:.1%} of the {role}'s steps had a gradient that was not finite and were skipped; "
        f"lower optimizer.{role}_lr, or train with precision fp32"
    )


RULES: dict[str, Rule] = {
    "collapse": collapse,
    "oversaturation": oversaturation,
    "stalled-fake": stalled_fake,
    "too-fast": too_fast,
    "not-finite": not_finite,
}

_FAKE = "flow_matching/relative"


def _relative_error(now: Metrics) -> Metrics:
    """|v - w|^2 against E|w|^2 = 1 + E|x_0|^2, the error of v = 0.

    The error itself follows the student's contrast, which triples in a healthy run; the ratio does not.
    """
    if "flow_matching" not in now or "latent/std" not in now:
        return {}
    return {_FAKE: now["flow_matching"] / (1 + now["latent/std"] ** 2)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
