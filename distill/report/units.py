"""Numbers and durations as text for people."""

import math


def si(value: float, unit: str = "", digits: int = 3) -> str:
    """Format with three digits, or more, and an SI prefix from a thousand on: `38.4 k`, `1.2 MB`."""
    size = abs(value)
    power = min(int(math.log10(size) / 3 + 1e-9), 4) if size >= 1 else 0
    if power < 4 and float(f"{size / 1000**power:.{digits}g}") >= 1000:
        power += 1
    suffix = ("", "k", "M", "G", "T")[power] + unit
    return f"{value / 1000**power:.{digits}g}".replace("-", "−") + (f" {suffix}" if suffix else "")


def duration(seconds: float) -> str:
    """Format seconds: `42 s`, `11 min 22 s`, `3 h 05 min`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if minutes else f"{s} s"


def rounded(value: float, error: float | None = None) -> str:
    """Format a number with the digits that its error leaves: one, or two where the error begins with 1.

    Without an error, three significant digits.
    """
    if error is None or not (math.isfinite(value) and 0 < error < math.inf):
        return f"{value:.3g}"
    exponent = math.floor(math.log10(error))
    return f"{value:.{max(0, (error < 2 * 10**exponent) - exponent)}f}"
