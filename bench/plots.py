"""Plots: waiting times of touches as a distribution; pages held over time.

What is drawn is decided without matplotlib, which is imported late: it is the benchmark's need alone, and results are
worth having without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.record import Results, Sample
from lazymem.pages import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Curve:
    """One round of a way; of several rounds only the first has its name, so that the legend has it once."""

    label: str | None
    colour: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Plot:
    """A measure over a link; `name` is its file's, without the suffix."""

    name: str
    title: str
    x_label: str
    y_label: str
    log_x: bool
    curves: tuple[Curve, ...]


def is_there() -> bool:
    """Whether anything can be drawn."""
    return find_spec("matplotlib") is not None


def plots_of(results: Results, links: dict[str, str], ways: dict[str, str]) -> list[Plot]:
    """Those that the results have series for. `links` and `ways`: name to title."""
    found = []
    for measure in dict.fromkeys(sample.case.measure for sample in results.samples):
        for link in dict.fromkeys(sample.case.link for sample in results.samples):
            samples = [s for s in results.samples if (s.case.measure, s.case.link) == (measure, link) and s.series]
            if samples:
                found.append(_plot(f"{measure}-{link}", f"{measure}, {links[link]}", samples, ways))
    return found


def _plot(name: str, title: str, samples: Sequence[Sample], ways: dict[str, str]) -> Plot:
    names = list(dict.fromkeys(sample.case.way for sample in samples))
    is_of_waits = "waits_seconds" in samples[0].series
    curves, labelled = [], set[str]()
    for sample in samples:
        way = sample.case.way
        x, y = _waits(sample) if is_of_waits else _held(sample)
        curves.append(Curve(ways[way] if way not in labelled else None, f"C{names.index(way)}", x, y))
        labelled.add(way)
    if is_of_waits:
        labels = "waiting time of a touch, seconds", "share of touches that waited no longer"
    else:
        labels = "seconds since the mount's command", "guest RAM held, MiB"
    return Plot(name, title, *labels, is_of_waits, tuple(curves))


def _waits(sample: Sample) -> tuple[list[float], list[float]]:
    ordered = sorted(sample.series["waits_seconds"])
    return ordered, [rank / len(ordered) for rank in range(1, len(ordered) + 1)]


def _held(sample: Sample) -> tuple[list[float], list[float]]:
    return sample.series["held_at_seconds"], [pages * PAGE_SIZE / (1 << 20) for pages in sample.series["held_pages"]]


def draw(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Writes them as SVG into `folder`; returns their paths. Raises ImportError: matplotlib is not there."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    drawn = []
    for plot in plots:
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for curve in plot.curves:
            axes.plot(curve.x, curve.y, color=curve.colour, label=curve.label)
        if plot.log_x:
            axes.set_xscale("log")
        axes.set_title(plot.title)
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        axes.grid(alpha=0.3)
        axes.legend()
        drawn.append(folder / f"{plot.name}.svg")
        figure.savefig(drawn[-1])
    return drawn
