"""Where the bytes of each page of a read are. Pure."""

from __future__ import annotations

import enum
import itertools

from lazymem.pages import PageRange
from lazymem.store.pagemap import SET, SET_ZERO


class Place(enum.IntEnum):
    """Where a page's bytes are; what the guest wrote goes before all else."""

    MISSING = 0
    CACHED = 1
    ZERO = 2
    """Cached, as a page of zeros without bytes."""
    WRITTEN = 3


# A state in a cache's map that no store of ours wrote is not believed: the page is missing.
_PLACES = tuple(Place)
_HELD_PLACES = bytes({SET: Place.CACHED, SET_ZERO: Place.ZERO}.get(state, Place.MISSING) for state in range(256))


def plan(pages: PageRange, held: bytes, written: bytes) -> list[tuple[Place, PageRange]]:
    """Consecutive runs that cover `pages`, from the two maps' states of them (one byte a page)."""
    places = held.translate(_HELD_PLACES)
    if written.count(0) != len(written):
        places = bytes(Place.WRITTEN if was else place for place, was in zip(places, written, strict=True))
    if places.count(places[0]) == len(places):
        return [(_PLACES[places[0]], pages)]
    found = []
    start = pages.start
    for place, group in itertools.groupby(places):
        count = sum(1 for _ in group)
        found.append((Place(place), PageRange(start, count)))
        start += count
    return found
