"""What to bring before it is asked for: guesses only, pure; the scheduler asks when it has nothing better to do.

In order: what an earlier resume touched (`recorded`), what is next to the guest's own latest faults (`neighbourhood`),
what it reads page after page (`streams`), what is wider around its faults, and whatever else is missing (`sweep`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lazymem.fetch.neighbourhood import Neighbourhoods
from lazymem.fetch.recorded import RecordedSet
from lazymem.fetch.sink import MissingOf
from lazymem.fetch.streams import Streams
from lazymem.fetch.sweep import LeafMissing, Sweeps, sweep_of
from lazymem.pages import PageRange


class Prefetcher(Protocol):
    """A strategy. The scheduler tells what happened and asks for the next guess."""

    def faulted(self, pages: PageRange) -> None:
        """The guest demanded `pages`."""
        ...

    @property
    def is_near(self) -> bool:
        """Whether guesses around the latest demands are worth more than a sweep."""
        ...

    def brought(self, pages: PageRange) -> None:
        """Pages were kept, whoever asked for them."""
        ...

    def next_range(self, max_pages: int) -> PageRange | None:
        """The next guess, at most `max_pages` long; pages of it may already be on their way. None: nothing now.

        Never gives a page more than three times unless `brought` was called in between, so asking until None comes
        ends.
        """
        ...


class Prepager:
    """The strategy of a mount. `maybe_recorded`: pages of a working set; `maybe_sweep`: without it the rest stays
    where it is until it is touched."""

    def __init__(
        self,
        neighbourhoods: Neighbourhoods,
        streams: Streams,
        maybe_recorded: RecordedSet | None = None,
        maybe_sweep: Sweeps | None = None,
        others_bring_set: Callable[[], bool] = lambda: False,
    ) -> None:
        self._others_bring_set = others_bring_set
        self._recorded = maybe_recorded
        self._neighbourhoods = neighbourhoods
        self._streams = streams
        self._sweep = maybe_sweep

    @property
    def set_is_coming(self) -> bool:
        """Whether recorded pages are still to be asked for."""
        return self._recorded is not None

    def go_on_with(self, recorded: RecordedSet, maybe_sweep: Sweeps | None) -> None:
        """Who else was to bring these does not any more."""
        self._recorded = recorded
        self._sweep = maybe_sweep

    def are_of_a_stream(self, pages: PageRange) -> bool:
        """As `Streams.are_of_one`."""
        return self._streams.are_of_one(pages)

    def faulted(self, pages: PageRange) -> None:
        self._neighbourhoods.faulted(pages)
        self._streams.faulted(pages)

    @property
    def is_near(self) -> bool:
        return self._neighbourhoods.is_near

    def brought(self, pages: PageRange) -> None:
        if self._sweep is not None:
            self._sweep.brought(pages)

    def next_range(self, max_pages: int) -> PageRange | None:
        if self._recorded is not None:
            found = self._recorded.next_range(max_pages)
            if found is not None:
                return found
            self._recorded = None  # all of it was asked for
        if self._others_bring_set():
            return None  # what surrounds a fault is mostly of the set, and would cross the link twice
        found = (
            self._neighbourhoods.nearest_range(max_pages)
            or self._streams.next_range(max_pages)
            or self._neighbourhoods.next_range(max_pages)
        )
        return found if found is not None or self._sweep is None else self._sweep.next_range(max_pages)


def prepager(
    missing: MissingOf,
    total_pages: int,
    *,
    recorded: tuple[PageRange, ...] = (),
    whole_blocks: Callable[[], bool] = lambda: False,
    sweep: bool = True,
    maybe_leaf_missing: LeafMissing | None = None,
    others_bring_set: Callable[[], bool] = lambda: False,
) -> Prepager:
    """A strategy over the sink's `next_missing`, and its `missing_leaves` (without that the sweep has no scouts).
    `whole_blocks`: as of `RecordedSet`.
    `others_bring_set`: whether another process is bringing a recorded set; nothing is guessed meanwhile."""
    return Prepager(
        Neighbourhoods(missing, total_pages),
        Streams(missing, total_pages),
        RecordedSet(missing, recorded, whole_blocks) if recorded else None,
        sweep_of(missing, total_pages, maybe_leaf_missing) if sweep else None,
        others_bring_set,
    )
