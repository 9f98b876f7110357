"""Numbers and durations as text."""

import pytest

from distill.report.units import duration, rounded, si


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0625, "0.0625"), (-0.5, "−0.5"), (999, "999"), (999.9, "1 k"), (38_400, "38.4 k"), (2.5e6, "2.5 M")],
)
def test_figures_have_si_prefixes(value: float, text: str) -> None:
    assert si(value) == text


def test_durations_read_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (42, 682, 11_100)] == ["42 s", "11 min 22 s", "3 h 05 min"]


def test_numbers_have_the_digits_that_their_error_leaves() -> None:
    assert [rounded(0.81234, error) for error in (0.0271, 0.0171, 0.3, 7.0)] == ["0.81", "0.812", "0.8", "1"]
    assert [rounded(value) for value in (7.7531, 0.00012345, 123.4)] == ["7.75", "0.000123", "123"]
    assert [rounded(0.5, error) for error in (0.0, float("nan"))] == ["0.5", "0.5"]
