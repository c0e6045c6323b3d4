"""Plots: waiting times of touches as a distribution; pages held over time. matplotlib is imported late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.record import Results, Sample
from lazymem.pages import PAGE_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(results: Results, folder: Path, links: dict[str, str], ways: dict[str, str]) -> list[Path]:
    """Writes the plots that the results have series for; returns their paths."""
    import matplotlib

    matplotlib.use("agg")
    drawn = []
    for measure in dict.fromkeys(sample.case.measure for sample in results.samples):
        for link in dict.fromkeys(sample.case.link for sample in results.samples):
            samples = [s for s in results.samples if (s.case.measure, s.case.link) == (measure, link) and s.series]
            if samples:
                path = folder / f"{measure}-{link}.svg"
                _draw_one(samples, f"{measure}, {links[link]}", path, ways)
                drawn.append(path)
    return drawn


def _draw_one(samples: Sequence[Sample], title: str, path: Path, ways: dict[str, str]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(sample.case.way for sample in samples))
    for sample in samples:
        color = f"C{names.index(sample.case.way)}"
        # One entry in the legend for all rounds of a way.
        label = ways[sample.case.way] if sample is _first(samples, sample.case.way) else None
        if "waits_seconds" in sample.series:
            _draw_waits(axes, sample.series["waits_seconds"], color, label)
        else:
            _draw_held(axes, sample.series, color, label)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _first(samples: Sequence[Sample], way: str) -> Sample:
    return next(sample for sample in samples if sample.case.way == way)


def _draw_waits(axes: Axes, waits: Sequence[float], color: str, label: str | None) -> None:
    ordered = sorted(waits)
    axes.plot(ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))], color=color, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("waiting time of a touch, seconds")
    axes.set_ylabel("share of touches that waited no longer")


def _draw_held(axes: Axes, series: dict[str, list[float]], color: str, label: str | None) -> None:
    held = [pages * PAGE_SIZE / (1 << 20) for pages in series["held_pages"]]
    axes.plot(series["held_at_seconds"], held, color=color, label=label)
    axes.set_xlabel("seconds since the mount's command")
    axes.set_ylabel("guest RAM held, MiB")
