"""Series of measured values, and the tables that people read. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """One table of a result: the first column names the row, the others are figures."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1, unit: str = "") -> str:
    """Median, and the range in brackets if there is more than one value."""
    if not values:
        return NOTHING
    scaled = [value * scale for value in values]
    middle = f"{statistics.median(scaled):.{digits}f}{unit}"
    if len(scaled) == 1:
        return middle
    return f"{middle} ({min(scaled):.{digits}f}-{max(scaled):.{digits}f})"


def milliseconds(values: Sequence[float]) -> str:
    """Seconds, shown as milliseconds."""
    return spread(values, 1000, 0 if values and statistics.median(values) >= 0.01 else 2)


def seconds(values: Sequence[float]) -> str:
    """Seconds."""
    return spread(values, 1, 1 if values and statistics.median(values) >= 1 else 2)


def ratio(values: Sequence[float], baseline: Sequence[float], digits: int = 2) -> str:
    """Median over median."""
    if not values or not baseline or statistics.median(baseline) == 0:
        return NOTHING
    return f"{statistics.median(values) / statistics.median(baseline):.{digits}f}"


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that ``percent`` of all do not exceed; nan for none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(len(ordered) * percent / 100) - 1))]


def count(number: float) -> str:
    """A number of things, with separators."""
    return f"{number:,.0f}"
