"""What the guest touched first, and in which order, as far as the kernel tells: recordings, and what a set was worth.

The kernel tells of a touch by the READ that it makes, once, of the page and of what it reads ahead around it, and does
not say which page it was; all of them count, unless read-ahead was refused (`fs.readahead`). READs that we made the
kernel send, to fill its cache, are kept out by whoever tells of READs here; a page that came into that cache so is
touched without our knowledge.

Plain functions, called on trio's thread for each READ: a quarter of a microsecond for one that holds no first touch.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable

from msgspec import Struct

from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, PageRange

_NO, _YES = b"\0", b"\1"


class TouchStatistics(Struct, frozen=True):
    """Pages, since the mount. `set_pages`: of the working set that was used. `set_touched`: of these, asked for by the
    guest's kernel. `set_ready`: of these, here before that. `touched`: all that the kernel asked for."""

    touched: int
    set_pages: int
    set_touched: int
    set_ready: int


class Touches:
    """`held` gives one byte a page, 0 for a missing one (`PristinePages.states`); `recorded`: a working set's runs."""

    def __init__(
        self, total_pages: int, held: Callable[[PageRange], bytes], recorded: Iterable[PageRange] = ()
    ) -> None:
        self._held = held
        self._seen = _page_bytes(total_pages)
        self._in_set: mmap.mmap | None = None
        self._touched = self._set_pages = self._set_touched = self._set_ready = 0
        self._log: Recording | None = None
        for run in recorded:
            self._in_set = self._in_set or _page_bytes(total_pages)
            self._in_set[run.start : run.end] = _YES * run.count
            self._set_pages += run.count

    def record(self, log: Recording | None) -> None:
        """From now on put first touches into `log`, or nowhere."""
        self._log = log

    def read(self, offset: int, length: int) -> None:
        """The guest's kernel asks for these bytes, which lie inside the RAM."""
        start, end = offset >> PAGE_SHIFT, (offset + length + PAGE_SIZE - 1) >> PAGE_SHIFT
        first = self._seen.find(_NO, start, end)
        if first >= 0:
            self._first(first, end)

    def written(self, offset: int, length: int) -> None:
        """They are overwritten. Whole pages are needed from nobody from now on; of a page in part the rest was."""
        first, end = -(-offset >> PAGE_SHIFT), (offset + length) >> PAGE_SHIFT
        if offset % PAGE_SIZE:
            self.read(offset, 1)
        if (offset + length) % PAGE_SIZE and end >= first:
            self.read(offset + length - 1, 1)
        if first < end:
            self._seen[first:end] = _YES * (end - first)

    def statistics(self) -> TouchStatistics:
        return TouchStatistics(self._touched, self._set_pages, self._set_touched, self._set_ready)

    def _first(self, start: int, end: int) -> None:
        seen = self._seen
        while start >= 0:
            stop = seen.find(_YES, start, end)
            if stop < 0:
                stop = end
            self._note(start, stop - start)
            start = -1 if stop == end else seen.find(_NO, stop, end)

    def _note(self, start: int, count: int) -> None:
        self._seen[start : start + count] = _YES * count
        self._touched += count
        if self._in_set is not None:
            self._count(self._in_set[start : start + count], PageRange(start, count))
        if self._log is not None:
            self._log.add(start, count)

    def _count(self, in_set: bytes, pages: PageRange) -> None:
        touched = in_set.count(_YES)
        if touched:
            self._set_touched += touched
            missing = self._held(pages).translate(_IS_MISSING)
            both = int.from_bytes(in_set, "little") & int.from_bytes(missing, "little")
            self._set_ready += touched - both.bit_count()


class Recording:
    """Runs in order of first touch, at most `max_runs`; `on_first` is called at the first, `on_full` with the last."""

    def __init__(self, max_runs: int, on_first: Callable[[], None], on_full: Callable[[], None]) -> None:
        self._max_runs = max_runs
        self._on_first = on_first
        self._on_full = on_full
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, count: int) -> None:
        ends = self._ends
        if ends and ends[-1] == start:
            ends[-1] = start + count
            return
        if len(ends) >= self._max_runs:
            return
        self._starts.append(start)
        ends.append(start + count)
        if len(ends) == 1:
            self._on_first()
        if len(ends) == self._max_runs:
            self._on_full()

    def runs(self) -> tuple[PageRange, ...]:
        return tuple([PageRange(start, end - start) for start, end in zip(self._starts, self._ends, strict=True)])


_IS_MISSING = bytes(state == 0 for state in range(256))


def _page_bytes(pages: int) -> mmap.mmap:
    """One byte a page, 0; memory only where one is set."""
    return mmap.mmap(-1, pages, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
