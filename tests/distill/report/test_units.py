"""Numbers and durations as text."""

import pytest

from distill.report.units import duration, si


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0625, "0.0625"), (-0.5, "−0.5"), (999, "999"), (999.9, "1 k"), (38_400, "38.4 k"), (2.5e6, "2.5 M")],
)
def test_figures_have_si_prefixes(value: float, text: str) -> None:
    assert si(value) == text


def test_durations_read_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (42, 682, 11_100)] == ["42 s", "11 min 22 s", "3 h 05 min"]
