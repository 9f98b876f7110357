"""Alarms: rules that detect a failing run in its metrics, each with a sentence on the cause and the fix. No torch.

A rule is a pure function of the means over the last WINDOW lines of the log, and of the lowest and highest such means
so far; a rule of evaluations is one of a single evaluation. An alarm is raised once, at the first line at which its
rule applies.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

Metrics = dict[str, float]
Rule = Callable[[Metrics, Metrics, Metrics], str | None]  # now, lowest, highest -> message

WINDOW = 3  # lines of the log
COLLAPSED = 0.5  # share of the highest diversity so far
OVERSATURATED = 0.1  # share of the latents' values; healthy runs stay below 0.05
STALLED = 2.0  # times the lowest error of the fake so far
GRID = 2.0  # times the teacher's energy at the period of a patch
PSNR_FALL = 3.0  # dB below the highest mean so far
BLURRED = 0.9  # share of the VAE's differences between neighboring pixels
COLOR_SHIFT = 2.0  # levels of 255
TOO_FAST = 0.05  # |update| / |weights| of a round; healthy runs stay below 0.01
_FAKE = "flow_matching/relative"


@dataclass(frozen=True)
class Alarm:
    """An alarm: the name of the rule, the training samples so far when it was raised, and the message."""

    name: str
    images: int
    message: str


def collapse(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """The images of a batch become alike. Diversity rises from a blurred start, so its maximum is the reference."""
    diversity, most = now.get("latent/diversity"), highest.get("latent/diversity", 0.0)
    if diversity is None or diversity >= COLLAPSED * most:
        return None
    return (
        f"the diversity of a batch fell from {most:.2g} to {diversity:.2g}: the student collapses; "
        "lower optimizer.student_lr, raise method.fake_steps, or lower the teacher's guidance"
    )


def oversaturation(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """Latents leave the range of the autoencoder."""
    share = now.get("latent/saturated")
    if share is None or share <= OVERSATURATED:
        return None
    return (
        f"{share:.0%} of the student's latents exceed three standard deviations: its images are over-saturated; "
        "lower the teacher's guidance or optimizer.student_lr, or raise batch"
    )


def stalled_fake(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """The fake does not model the student's images, so that the student learns from a wrong velocity field."""
    error, least = now.get(_FAKE), lowest.get(_FAKE, 0.0)
    if error is None or error <= STALLED * least:
        return None
    return (
        f"the fake's error, relative to that of v = 0, rose from {least:.2g} to {error:.2g}: "
        "it does not follow the student; raise method.fake_steps or optimizer.fake_lr, "
        "or lower optimizer.student_lr"
    )


def too_fast(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """Steps are so large that they destroy the teacher's weights."""
    role, ratio = _highest_of_roles(now, "update_ratio")
    if ratio <= TOO_FAST:
        return None
    return f"one round changes the {role}'s weights by {ratio:.1%} of their norm; lower optimizer.{role}_lr"


def not_finite(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """Steps are skipped; more than `optimizer.max_skipped_steps` in a row end the run."""
    role, share = _highest_of_roles(now, "skipped")
    if not share:
        return None
    return (
        f"{share:.1%} of the {role}'s steps had a gradient that was not finite and were skipped; "
        f"lower optimizer.{role}_lr, or train with precision fp32"
    )


def lost_diversity(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """Images of one prompt are much more alike than the teacher's."""
    diversity = now.get("relative_diversity", 1.0)
    if diversity >= COLLAPSED:
        return None
    return (
        f"images of one prompt have {diversity:.0%} of the diversity of the teacher's: the student loses modes; "
        "lower optimizer.student_lr, raise method.fake_steps, or lower the teacher's guidance"
    )


def grid_artifacts(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """The borders or a texture of the transformer's patches are visible."""
    grid = now.get("grid", 1.0)
    if grid <= GRID:
        return None
    return (
        f"images have {grid:.1f} times the teacher's energy at the period of a patch: a grid is visible; "
        "lower optimizer.student_lr, raise method.fake_steps, or export an earlier checkpoint"
    )


def decoder_skipped(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """Steps of a small decoder are skipped; several in a row end its training."""
    share = now.get("skipped", 0.0)
    if not share:
        return None
    return f"{share:.1%} of the steps had a gradient that was not finite and were skipped; lower learning_rate"


def decoder_diverges(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """A small decoder becomes worse on its own training images."""
    value, best = now.get("psnr"), highest.get("psnr", 0.0)
    if value is None or value >= best - PSNR_FALL:
        return None
    return f"the PSNR of training fell from {best:.1f} to {value:.1f} dB: steps are too large; lower learning_rate"


def decoder_blurs(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """A small decoder's images lack detail."""
    sharpness = now.get("sharpness", 1.0)
    if sharpness >= BLURRED:
        return None
    return (
        f"images have {sharpness:.0%} of the edges of the VAE's: they are blurred; train longer, or raise width, "
        "blocks or weights.gradient in a new --out"
    )


def decoder_shifts_colors(now: Metrics, lowest: Metrics, highest: Metrics) -> str | None:
    """A small decoder changes the colors."""
    shift = now.get("color_shift", 0.0)
    if shift <= COLOR_SHIFT:
        return None
    return (
        f"the mean of a color channel is {shift:.1f} levels of 255 off the VAE's: colors shift; train longer, or raise "
        "weights.squared in a new --out"
    )


@dataclass(frozen=True)
class Rules:
    """Rules by name: those of the log of metrics, and those of evaluations."""

    log: Mapping[str, Rule]
    evaluations: Mapping[str, Rule]


DISTILLATION = Rules(
    log={
        "collapse": collapse,
        "oversaturation": oversaturation,
        "stalled-fake": stalled_fake,
        "too-fast": too_fast,
        "not-finite": not_finite,
    },
    evaluations={"lost-diversity": lost_diversity, "grid-artifacts": grid_artifacts},
)
SMALL_DECODER = Rules(
    log={"not-finite": decoder_skipped, "diverging": decoder_diverges},
    evaluations={"blurred": decoder_blurs, "color-shift": decoder_shifts_colors},
)


class Alarms:
    """Applies rules to a log, line by line."""

    def __init__(self, raised: Iterable[str] = (), rules: Rules = DISTILLATION) -> None:
        """`raised` are names of alarms that are not raised again."""
        self._rules = rules
        self._recent: deque[Metrics] = deque(maxlen=WINDOW)
        self._lowest: Metrics = {}
        self._highest: Metrics = {}
        self._raised = set(raised)

    def add(self, line: Metrics) -> list[Alarm]:
        """Add the next line of the log and return the alarms that it raises."""
        self._recent.append(line)
        if len(self._recent) < WINDOW:
            return []
        names = {name for each in self._recent for name in each}
        now = {name: fmean(each[name] for each in self._recent if name in each) for name in names}
        now |= _relative_error(now)
        for name, value in now.items():
            self._lowest[name] = min(value, self._lowest.get(name, value))
            self._highest[name] = max(value, self._highest.get(name, value))
        return self._apply(self._rules.log, int(line["images"]), now)

    def add_evaluation(self, line: Metrics) -> list[Alarm]:
        """Add the metrics of an evaluation and return the alarms that they raise."""
        return self._apply(self._rules.evaluations, int(line["images"]), line)

    def _apply(self, rules: Mapping[str, Rule], images: int, now: Metrics) -> list[Alarm]:
        raised = []
        for name, rule in rules.items():
            message = None if name in self._raised else rule(now, self._lowest, self._highest)
            if message is not None:
                self._raised.add(name)
                raised.append(Alarm(name, images, message))
        return raised


def _relative_error(now: Metrics) -> Metrics:
    """The fake's error |v - w|^2 relative to that of v = 0, which is E|w|^2 = 1 + E|x_0|^2.

    The error itself grows with the student's contrast, which triples in a healthy run; the ratio does not.
    """
    if "flow_matching" not in now or "latent/std" not in now:
        return {}
    return {_FAKE: now["flow_matching"] / (1 + now["latent/std"] ** 2)}


def _highest_of_roles(now: Metrics, metric: str) -> tuple[str, float]:
    """The role, student or fake, with the higher value of a metric, and that value."""
    values = {role: now.get(f"{metric}/{role}", 0.0) for role in ("student", "fake")}
    return max(values.items(), key=lambda item: item[1])
