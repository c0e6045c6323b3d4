"""The guest's RAM as a few cells, for people: how much of each is missing, guessed, demanded, written. Pure.

Bounded whatever the size of the RAM: of a large cell only some pages are looked at, evenly spread.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

CELLS = 256
"""Four lines of a terminal. As JSON 4 KB, and an extended attribute may have 64."""

MAX_LOOKS = 512
"""Pages that are looked at in a cell: 1 to 2 ms for all cells, in which a fault may have to wait."""

_ONE_OR_NONE = bytes([0]) + bytes([1]) * 255

Look = Callable[[range], bytes]
"""One byte a page of the range, 0: it is not."""


class CoarseMap(Struct, frozen=True):
    """Each list has a share (0 to 1) a cell; what is left of 1 is missing. A page counts once: as written, if it is.

    `demanded`: held, and the guest's kernel asked for it. `guessed`: held, and nobody asked yet, or only we did, ahead
    of the guest; known zeros too. `pages_per_cell`: the last cell may have fewer.
    """

    pages_per_cell: int
    guessed: list[float]
    demanded: list[float]
    written: list[float]


def coarse_map(
    total_pages: int, held: Look, asked: Look, written: Look, maybe_ours: Look | None = None, cells: int = CELLS
) -> CoarseMap:
    """Look at `total_pages` (at least 1) pages, in at most `cells` cells. `maybe_ours`: of those asked for, the ones
    for which only we did ask."""
    per_cell = -(-total_pages // cells)
    found = CoarseMap(per_cell, [], [], [])
    for start in range(0, total_pages, per_cell):
        end = min(total_pages, start + per_cell)
        looks = range(start, end, -(-(end - start) // MAX_LOOKS))
        is_held, is_asked, is_written = (_bits(look(looks)) for look in (held, asked, written))
        is_ours = _bits(maybe_ours(looks)) if maybe_ours is not None else 0
        here = is_held & ~is_written
        demanded = (here & is_asked & ~is_ours).bit_count()
        found.guessed.append(_share(here.bit_count() - demanded, looks))
        found.demanded.append(_share(demanded, looks))
        found.written.append(_share(is_written.bit_count(), looks))
    return found


def _bits(states: bytes) -> int:
    """A number with one bit for each byte that is not 0."""
    return int.from_bytes(states.translate(_ONE_OR_NONE))


def _share(count: int, looks: range) -> float:
    return round(count / len(looks), 3)
