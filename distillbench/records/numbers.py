"""How results are rounded for people: one rule for the terminal, HTML, LaTeX, Markdown, CSV and verdicts."""

from __future__ import annotations

import math

MOST_DECIMALS = 12
MOST_FIXED = 8  # decimals from which on a number has an exponent
LARGEST_FIXED = 1e15


def decimals(value: float, half_width: float | None = None) -> int:
    """The number of decimals of a value: as many as its half width is rounded to.

    The half width is rounded as by the Particle Data Group: to two digits if its first three are below 355, else to one
    (so 1.234 has two decimals at 0.04 and at 0.12). Without one: four significant digits. Never below 0.
    """
    if half_width is not None and math.isfinite(half_width) and half_width > 0:
        lead = math.floor(math.log10(half_width))
        first = round(half_width / 10 ** (lead - 2))
        return max(0, min(MOST_DECIMALS, (1 if first < 355 else 0) - lead))
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, min(MOST_DECIMALS, 3 - math.floor(math.log10(abs(value)))))


def rounded(value: float, half_width: float | None = None) -> str:
    """A finite value with as many digits as `half_width`, half of its interval, allows; without one with four.

    Whole numbers without an interval, such as counts, are written in full. Numbers that would need more than MOST_FIXED
    decimals have an exponent.

    >>> rounded(176.84304, 7.7658), rounded(176.84304, 2.1), rounded(1870.512704), rounded(1797.0), rounded(2.01)
    ('177', '176.8', '1,871', '1,797', '2.010')
    """
    if half_width is None or not half_width > abs(value) * 1e-12 or not math.isfinite(half_width):
        half_width = None  # none, or one that is a rounding error
    whole = half_width is None and value == int(value)
    digits = 0 if whole else decimals(value, half_width)
    if abs(value) >= LARGEST_FIXED or (value and digits > MOST_FIXED):
        exponent = math.floor(math.log10(abs(value)))
        return f"{value:.{min(MOST_FIXED, max(0, digits + exponent)) if digits else 3}e}"
    return f"{value:,.{digits}f}"
