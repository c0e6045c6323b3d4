"""Guesses ahead of a guest that reads its memory page after page: as far ahead as keeps the link busy. Pure.

Such a guest is told by its faults. Where the link is slower than it reads, it waits where the latest answer ended,
again and again, a few pages further each time; where we are ahead of it, at the end of what was guessed. In both cases
the next pages are asked for before it gets there.
"""

from __future__ import annotations

from lazymem.fetch.sink import MissingOf
from lazymem.pages import PageRange

STEP_PAGES = 64
"""A fault so little above the last one goes on from it: an answer brings 16 to 64 pages over a slow link."""

STEPS = 2
"""So many in a row are no accident: of faults at random within 2 MiB one in ten is such a step."""

FIRST_AHEAD_PAGES = 64
MAX_AHEAD_PAGES = 512
"""2 MiB: doubled up to here with each step. A guest that turns to something else has cost a link of 100 Mb/s 0.17 s,
and its new faults' nearest pages go before."""

MAX_STREAMS = 8
"""Programs of a guest that read at a time; beyond, the one that was silent for longest goes."""


class _Stream:
    """`last`: behind its latest fault. `edge`: guessed up to here. `ahead`: pages, 0 until it is sure to be one."""

    __slots__ = ("ahead", "edge", "last", "steps")

    def __init__(self, end: int) -> None:
        self.last = self.edge = end
        self.steps = self.ahead = 0

    def goes_on_at(self, pages: PageRange) -> bool:
        within = max(self.last, self.edge if self.ahead else 0) + STEP_PAGES
        return self.last <= pages.start <= within or pages.end == self.last


class Streams:
    """`missing` is the sink's `next_missing`."""

    def __init__(self, missing: MissingOf, total_pages: int) -> None:
        self._missing = missing
        self._total_pages = total_pages
        self._streams: list[_Stream] = []  # the latest one at the end

    def faulted(self, pages: PageRange) -> None:
        for stream in reversed(self._streams):
            if stream.goes_on_at(pages):
                self._streams.remove(stream)
                self._streams.append(stream)
                if pages.end > stream.last:
                    self._step(stream, pages.end)
                return
        self._streams.append(_Stream(pages.end))
        if len(self._streams) > MAX_STREAMS:
            del self._streams[0]

    def _step(self, stream: _Stream, end: int) -> None:
        stream.last = end
        stream.edge = max(stream.edge, end)
        stream.steps += 1
        if stream.steps >= STEPS:
            stream.ahead = min(max(FIRST_AHEAD_PAGES, 2 * stream.ahead), MAX_AHEAD_PAGES)

    def are_of_one(self, pages: PageRange) -> bool:
        """Whether somebody reads page after page and will soon want `pages`."""
        return any(
            stream.ahead and stream.last - STEP_PAGES <= pages.start < stream.last + MAX_AHEAD_PAGES + STEP_PAGES
            for stream in self._streams
        )

    def next_range(self, max_pages: int) -> PageRange | None:
        """Of the stream that faulted last first."""
        for stream in reversed(self._streams):
            end = min(stream.last + stream.ahead, self._total_pages)
            if stream.edge >= end:
                continue
            found = self._missing(PageRange(stream.edge, end - stream.edge), max_pages)
            if found is None:
                stream.edge = end
                continue
            stream.edge = found.end
            return found
        return None
