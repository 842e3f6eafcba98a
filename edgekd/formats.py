"""Figures as people read them: units, significant digits, and "not measured" for what is null."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

NOT_MEASURED = "not measured"
NBSP = "\u00a0"
"""Between a number and its unit, so that no line ends between them."""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ASCII = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−–\u00a0\u202f", "-0123456789-- ,")
Format = Callable[[object], str]


def number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def significant(value: object, digits: int = 3) -> str:
    """Rounded to significant digits; powers of ten below 0.001, digits grouped from 10,000 on."""
    x = number(value)
    if x is None:
        return NOT_MEASURED
    if x == 0:
        return "0"
    if abs(x) < 1e-3:
        mantissa, _, power = f"{x:.1e}".partition("e")
        return f"{mantissa}×10{str(int(power)).translate(SUPERSCRIPT)}".replace("-", "−")
    exponent = math.floor(math.log10(abs(float(f"{x:.{digits - 1}e}"))))
    text = f"{x:,.{max(0, digits - 1 - exponent)}f}"
    return text.replace(",", "\u202f" if abs(x) >= 1e4 else "").replace("-", "−")


def percent(value: object, decimals: int = 1) -> str:
    """A share as percent."""
    x = number(value)
    return NOT_MEASURED if x is None else f"{100 * x:.{decimals}f}{NBSP}%".replace("-", "−")


def size(value: object) -> str:
    """Bytes in decimal units, as shops and file managers count them."""
    x = number(value)
    if x is None:
        return NOT_MEASURED
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if x >= scale:
            return f"{significant(x / scale)}{NBSP}{unit}"
    return f"{x:.0f}{NBSP}B"


def duration(value: object) -> str:
    """Seconds as ms, s or min."""
    x = number(value)
    if x is None:
        return NOT_MEASURED
    if x < 1:
        return f"{significant(1000 * x)}{NBSP}ms"
    if x < 60:
        return f"{significant(x)}{NBSP}s"
    minutes, seconds = divmod(round(x), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min")) if hours else ((minutes, "min"), (seconds, "s"))
    return NBSP.join(f"{n}{NBSP}{unit}" for n, unit in parts)


def count(value: object) -> str:
    """A whole number with its digits grouped."""
    x = number(value)
    return NOT_MEASURED if x is None else f"{x:,.0f}".replace(",", "\u202f")


def parameters(value: object) -> str:
    """A number of weights: 6.0M, 7.2B."""
    x = number(value)
    if x is None:
        return NOT_MEASURED
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if x >= scale:
            return f"{x / scale:.1f}{unit}"
    return f"{x:.0f}"


def spread(values: Sequence[float], show: Format) -> str:
    """Least and greatest of several values, each by the formatter ``show``; empty for fewer than two."""
    if len(values) < 2:
        return ""
    low, high = show(min(values)), show(max(values))
    number_part, space, unit = low.rpartition(NBSP)
    same_unit = space and high.endswith(space + unit) and NBSP not in number_part
    return f"{number_part if same_unit else low}–{high}"


def ratio(part: object, whole: object) -> float | None:
    """A quotient, None when one side is missing or the divisor zero."""
    a, b = number(part), number(whole)
    return a / b if a is not None and b else None


def plain(text: str) -> str:
    """A figure for a terminal, which may know no more than ASCII: ``4.1e-4``."""
    return text.replace("×10", "e").translate(_ASCII)
