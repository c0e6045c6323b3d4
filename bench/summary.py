"""Medians, spreads and ratios of what was measured. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one figure over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def summarize(values: Sequence[float]) -> Summary:
    """Raises ValueError for no values."""
    if not values:
        raise ValueError("nothing was measured")
    return Summary(statistics.median(values), min(values), max(values), len(values))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the ascending values lie; the nearest rank, no interpolation."""
    if not ordered:
        raise ValueError("no values")
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ratio(ours: Sequence[float], others: Sequence[float]) -> Summary | None:
    """Ours over theirs. Rounds are pairs when both have the same number of them, since they ran side by side."""
    if not ours or not others or any(value == 0 for value in others):
        return None
    if len(ours) == len(others):
        found = summarize([mine / other for mine, other in zip(ours, others, strict=True)])
        return Summary(statistics.median(ours) / statistics.median(others), found.low, found.high, found.rounds)
    value = statistics.median(ours) / statistics.median(others)
    return Summary(value, min(ours) / max(others), max(ours) / min(others), min(len(ours), len(others)))
