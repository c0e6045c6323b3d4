"""What verification, TLS and the supervisor cost: lazymem's ways beside their own variants. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.context import Measure
from bench.record import Case, Results
from bench.summary import ratio, summarize
from bench.units import shown
from bench.way import ALL_VARIANTS, VARIANTS, Variant

HEAD = ("link", "measure", "way", "figure", "neither", "supervisor", "TLS", "both", "unverified")

_COLUMNS = tuple(sorted(VARIANTS, key=lambda variant: (not variant.verified, variant.tls, variant.supervised)))
"""In the order of `HEAD`."""

_ALWAYS = ("ready_seconds", "daemon_cpu_seconds", "server_cpu_seconds")
"""Beside the figures that the measure's goals are about."""


def rows(results: Results, measures: Sequence[Measure], links: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """One for each figure of each way that was measured in several variants: medians, and their ratio to the row's
    first one."""
    for measure in measures:
        figures = dict.fromkeys([*(target.figure for target in measure.targets), *_ALWAYS])
        for link, way in measure.cases:
            if any(variant.suffix and way.endswith(variant.suffix) for variant in ALL_VARIANTS):
                continue  # in its own way's row
            for figure in figures:
                found = [_values(results, measure, link, way, variant, figure) for variant in _COLUMNS]
                if sum(map(bool, found)) > 1:
                    yield links[link], measure.name, way, figure.replace("_", " "), *_cells(found, figure)


def _values(results: Results, measure: Measure, link: str, way: str, variant: Variant, figure: str) -> list[float]:
    return results.values(Case(measure.name, link, way + variant.suffix), figure)


def _cells(found: Sequence[list[float]], figure: str) -> Iterator[str]:
    first = next(values for values in found if values)
    for values in found:
        if not values:
            yield "-"
        elif values is first:
            yield shown(summarize(values).median, figure)
        else:
            maybe_ratio = ratio(values, first)
            beside = f"; x {maybe_ratio.median:.2f}" if maybe_ratio is not None else ""
            yield shown(summarize(values).median, figure) + beside
