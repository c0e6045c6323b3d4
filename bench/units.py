"""Figures as text, with the unit that their name ends in. Pure."""

from __future__ import annotations

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def shown(value: float, figure: str) -> str:
    """With the unit that the figure's name ends in."""
    if figure.endswith("per_second"):
        return _scaled(value, "B/s")
    if "bytes" in figure:
        return _scaled(value, "B")
    if "seconds" in figure and "over" not in figure:
        for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
            if abs(value) * factor >= 1 or unit == "us":
                return f"{value * factor:.3g} {unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
