"""What a measure is given, and what it declares."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.images import Image
from bench.links import Link, Through, through
from bench.record import Case, Sample
from bench.way import VARIANTS, Mount, Server, Variant, Way


@dataclass(frozen=True, slots=True)
class Context:
    """One run of one case. `work`: where images are kept; `image` is the synthetic one."""

    case: Case
    link: Link
    way: Way
    round: int
    work: Path
    image: Image
    touches: int

    def sample(self, figures: dict[str, float], series: dict[str, list[float]] | None = None) -> Sample:
        return Sample(self.case, self.round, figures, series or {})

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new folder for this run, below a short path (sockets), gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="lazymem-bench-") as name:
            yield Path(name)

    @contextmanager
    def served(self, image: Image, folder: Path) -> Iterator[tuple[Server, Through]]:
        """The way's server with the image, and how it is seen through the link."""
        image.warm()
        with self.way.serve(image, folder) as server, through(self.link, server.address) as seen:
            yield server, seen

    @contextmanager
    def mounted(self, image: Image) -> Iterator[tuple[Mount, Through, Path]]:
        """Served and mounted."""
        with (
            self.folder() as folder,
            self.served(image, folder) as (_, seen),
            self.way.mount(seen, image, folder) as mount,
        ):
            yield mount, seen, folder


@dataclass(frozen=True, slots=True)
class Target:
    """One row of the table: `figure` of `way` over `link`, beside the same (or `other_figure`) of `beside`.

    `must` and `aim`: for the ratio, or with `beside` None for the figure itself; `at_least` when more is better.
    `slack`: with `beside`, a figure that is larger than theirs by no more than this reaches `must`, whatever the ratio.
    """

    title: str
    link: str
    way: str
    figure: str
    beside: str | None = None
    other_figure: str | None = None
    must: float | None = None
    aim: float | None = None
    at_least: bool = False
    slack: float | None = None
    beyond: str | None = None
    """The way whose median is taken off both first."""


@dataclass(frozen=True, slots=True)
class Measure:
    """`run(context)` gives one sample. `cases`: (link, way) pairs that it is for."""

    name: str
    title: str
    cases: tuple[tuple[str, str], ...]
    run: Callable[[Context], Sample]
    targets: tuple[Target, ...] = ()
    variants: tuple[Variant, ...] = VARIANTS
    """Of lazymem's ways: with which protection it can be run."""

    def offers(self, link: str, way: Way) -> bool:
        """Whether there is such a case, if only as a variant of one of `cases`."""
        return (link, way.name) in self.cases or ((link, way.base) in self.cases and way.variant in self.variants)


def pairs(links: tuple[str, ...], ways: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """All links with all ways."""
    return tuple((link, way) for link in links for way in ways)
