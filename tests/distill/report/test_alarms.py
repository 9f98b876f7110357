"""Each alarm is raised once by a log of its failure, and by no healthy log."""

import pytest

from distill.report.alarms import SMALL_DECODER, WINDOW, Alarm, Alarms

# The start of a healthy run: a blurred student gains contrast, so error, spread and gap triple and settle.
STD = [0.39, 0.45, 0.65, 0.90, 1.01, 1.11, 1.13, 1.14, 1.15, 1.18, 1.18, 1.17]
DIVERSITY = [0.41, 0.52, 0.81, 1.18, 1.34, 1.53, 1.56, 1.56, 1.58, 1.60, 1.64, 1.62]
ERROR = [0.44, 0.35, 0.38, 0.56, 0.66, 0.75, 0.76, 0.75, 0.74, 0.77, 0.76, 0.73]


def healthy() -> list[dict[str, float]]:
    return [
        {
            "images": 640.0 * (i + 1),
            "flow_matching": ERROR[i],
            "latent/std": STD[i],
            "latent/diversity": DIVERSITY[i],
            "latent/saturated": 0.04,
            "update_ratio/student": 0.002,
            "update_ratio/fake": 0.004,
            "skipped/student": 0.0,
            "skipped/fake": 0.0,
        }
        for i in range(len(STD))
    ]


def worsened(**last: float) -> list[dict[str, float]]:
    """A healthy log, and then lines with other metrics."""
    log = healthy()
    return [*log, *({**log[-1], "images": 640.0 * (len(log) + i + 1), **last} for i in range(2 * WINDOW))]


def alarms(log: list[dict[str, float]]) -> list[Alarm]:
    """All alarms of a log."""
    rules = Alarms()
    return [alarm for line in log for alarm in rules.add(line)]


@pytest.mark.parametrize(("metric", "good", "bad"), [("grid", 1.2, 2.5), ("relative_diversity", 0.9, 0.3)])
def test_an_evaluation_raises_an_alarm_at_once_but_not_again(metric: str, good: float, bad: float) -> None:
    rules = Alarms()
    assert rules.add_evaluation({"images": 8.0, metric: good}) == []
    (raised,) = rules.add_evaluation({"images": 16.0, metric: bad})
    assert raised.images == 16
    assert rules.add_evaluation({"images": 24.0, metric: bad}) == []
    assert Alarms([raised.name]).add_evaluation({"images": 24.0, metric: bad}) == []


def test_a_healthy_run_raises_none() -> None:
    assert alarms(healthy()) == []
    assert alarms(worsened()) == []


@pytest.mark.parametrize(
    ("name", "metrics", "words"),
    [
        ("collapse", {"latent/diversity": 0.3}, "fake_steps"),
        ("oversaturation", {"latent/saturated": 0.3}, "guidance"),
        ("stalled-fake", {"flow_matching": 2.5}, "fake_lr"),
        ("too-fast", {"update_ratio/fake": 0.3}, "lower optimizer.fake_lr"),
        ("not-finite", {"skipped/student": 0.1}, "student's steps"),
    ],
)
def test_each_rule_is_raised_once_and_says_what_to_try(name: str, metrics: dict[str, float], words: str) -> None:
    log = worsened(**metrics)
    (alarm,) = alarms(log)
    assert alarm.name == name
    assert words in alarm.message
    assert 640 * len(STD) < alarm.images <= 640 * (len(STD) + WINDOW)
    assert alarms(log[: alarm.images // 640 - 1]) == []


def test_one_odd_line_and_a_short_log_raise_none() -> None:
    log = healthy()
    log[8]["latent/diversity"] = 0.5
    log[10]["latent/saturated"] = 0.15
    assert alarms(log) == []
    assert alarms(worsened(**{"latent/saturated": 0.9})[-WINDOW + 1 :]) == []


def test_a_method_without_a_fake_has_no_fake_to_stall() -> None:
    log = [{"images": float(i), "latent/std": 1.0, "loss/student": 2.0**i} for i in range(9)]
    assert alarms(log) == []


def test_line_by_line_is_the_whole_log() -> None:
    log, rules = worsened(**{"latent/diversity": 0.1, "latent/saturated": 0.5}), Alarms()
    assert [alarm for line in log for alarm in rules.add(line)] == alarms(log)
    assert {alarm.name for alarm in alarms(log)} == {"collapse", "oversaturation"}


@pytest.mark.parametrize(
    ("last", "names"),
    [
        ({"psnr": 33.0, "skipped": 0.0}, []),
        ({"psnr": 29.0, "skipped": 0.0}, ["diverging"]),
        ({"psnr": 33.0, "skipped": 0.01}, ["not-finite"]),
    ],
)
def test_a_small_decoders_log_raises_its_own_alarms(last: dict[str, float], names: list[str]) -> None:
    rules = Alarms(rules=SMALL_DECODER)
    lines = [{"psnr": psnr, "skipped": 0.0} for psnr in (20.0, 28.0, 32.0, 33.0, 33.0)] + [last] * WINDOW
    found = [alarm for i, line in enumerate(lines) for alarm in rules.add({"images": 800.0 * i, **line})]
    assert [alarm.name for alarm in found] == names


def test_blurred_images_and_other_colors_of_a_small_decoder_are_named_once() -> None:
    rules = Alarms(rules=SMALL_DECODER)
    assert rules.add_evaluation({"images": 8.0, "sharpness": 0.95, "color_shift": 1.0}) == []
    bad = {"images": 16.0, "sharpness": 0.5, "color_shift": 4.0}
    blurred, shifted = rules.add_evaluation(bad)
    assert "50% of the edges" in blurred.message
    assert "4.0 levels" in shifted.message
    assert rules.add_evaluation(bad) == []
