"""Which pages the kernel is asked to take next, as steps that it takes whole. Pure.

A page's state here is one byte: `DONE`, there is nothing to fill (zero, written, or the kernel has had it); `READY`,
held; `MISSING`, it may become ready.
"""

from __future__ import annotations

from collections.abc import Iterator

from lazymem.fs.tuning import READ_AHEAD_KB
from lazymem.pages import PAGE_SHIFT, PageRange

DONE, READY, MISSING = 0, 1, 2

STEP_PAGES = (READ_AHEAD_KB << 10) >> PAGE_SHIFT
"""One call is cut to `read_ahead_kb`, and one request to `max_read`, which are the same."""

_DONE_BYTE, _READY_BYTE = bytes([DONE]), bytes([READY])


def without(states: bytes, asked: bytes) -> bytes:
    """`states` with `DONE` where `asked`, one byte a page too, is 1."""
    if _READY_BYTE not in states or _READY_BYTE not in asked:
        return states
    mask = int.from_bytes(asked, "little") * (READY | MISSING)
    return (int.from_bytes(states, "little") & ~mask).to_bytes(len(states), "little")


def blocks(pages: PageRange) -> Iterator[PageRange]:
    """`pages` cut where multiples of `STEP_PAGES` are."""
    start = pages.start
    while start < pages.end:
        end = min(start - start % STEP_PAGES + STEP_PAGES, pages.end)
        yield PageRange(start, end - start)
        start = end


def ready_runs(first: int, states: bytes) -> Iterator[PageRange]:
    """The runs of `READY` pages, of which `states` tells from page `first` on."""
    at = states.find(_READY_BYTE)
    while at >= 0:
        rest = states[at:]
        count = len(rest) - len(rest.lstrip(_READY_BYTE))
        yield PageRange(first + at, count)
        at = states.find(_READY_BYTE, at + count)
