"""Read-ahead that was refused, given to the kernel once its pages are here: where the guest is at work, and at once.

A refusal (`readahead`) tells which page is touched, and leaves the pages around it empty in the kernel's cache. Whoever
touches one of these makes the kernel ask for it alone, which costs him as much as 32 of them in one READ. So when the
guest has asked for a page of a refused block, the rest of the block follows as soon as nothing of it is missing any
more, by the kernel's own READ (POSIX_FADV_WILLNEED, as in `pagecache`): with its own page locks, in any order.

The kernel has no more of the guest's RAM by it than without the refusal, so no memory is looked after here. State
belongs to trio's thread, but for what `_Advisor` says. See record 0023.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

import trio

from lazymem.fs import fillplan, mountinfo
from lazymem.fs.ownfile import OwnFile
from lazymem.fs.tuning import MAX_BACKGROUND
from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, PageRange

log = logging.getLogger(__name__)

BLOCK_PAGES = fillplan.STEP_PAGES
"""128 KiB: a READ of the kernel's read-ahead, and what is guessed around a fault first."""

MAX_OPEN_PAGES = MAX_BACKGROUND // 16 * BLOCK_PAGES
"""READs of ours at a time, which a demand may find before it in the kernel's queue: some 0.4 ms."""

MAX_BLOCKS = 64
"""That wait for their pages: of more, those are left to the guest that it touched longest ago."""

WAIT_SECONDS = 0.1
"""So long a block's pages may take: 128 KiB over 20 ms and 100 Mb/s, and some queue. Then the guest has moved on."""

LOOK_SECONDS = 0.002

ARRIVAL_SECONDS = 0.02
"""What has not become a request by then was in the kernel already."""

IDLE_SECONDS = 0.05
"""The file stays open for so long without work: opening it is a request, too, and an unmount waits for its end."""


class Refused:
    """`at_hand(offset, size)`: whether none of these bytes has to be fetched."""

    def __init__(self, total_pages: int, at_hand: Callable[[int, int], bool]) -> None:
        self._total_pages = total_pages
        self._at_hand = at_hand
        # One byte a page; memory only where one is set. 1: refused, and not asked for since.
        self._empty = mmap.mmap(-1, total_pages, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._any = False
        self._touched: dict[int, float] = {}  # blocks by their first page: since when the guest is at work there
        self._something = trio.Event()
        self._maybe_advisor: _Advisor | None = None

    # ---- told by others

    def refuse(self, pages: PageRange) -> None:
        """A READ of `pages` was refused."""
        self._empty[pages.start : pages.end] = b"\1" * pages.count
        self._any = True

    def takes(self, thread: int, offset: int, size: int) -> bool:
        """Whether the READ that thread `thread` made the kernel send is one of ours. To be asked once for each."""
        if self._maybe_advisor is None or not self._maybe_advisor.takes(thread, size):
            return False
        self.given(offset, size)
        return True

    def given(self, offset: int, size: int) -> bool:
        """The kernel gets these bytes; whether some of them had been refused."""
        start, end = offset >> PAGE_SHIFT, (offset + size + PAGE_SIZE - 1) >> PAGE_SHIFT
        if not self._any or self._empty.find(b"\1", start, end) < 0:
            return False
        self._empty[start:end] = bytes(end - start)
        return True

    def touched(self, offset: int, size: int) -> None:
        """The guest gets these bytes: where they had been refused, it is at work."""
        if not self.given(offset, size) or self._maybe_advisor is None:
            return
        page = offset >> PAGE_SHIFT
        block = page - page % BLOCK_PAGES
        if block in self._touched or self._give(self._maybe_advisor, block):
            return
        self._touched[block] = monotonic()
        if len(self._touched) > MAX_BLOCKS:
            del self._touched[next(iter(self._touched))]
        self._something.set()

    # ---- what waits for its pages

    async def run(self, mounted: mountinfo.Mount) -> None:
        """Until cancelled."""
        advisor = self._maybe_advisor = _Advisor(mounted)
        try:
            while True:
                await self._something.wait()
                self._look(advisor)
                if self._touched:
                    await trio.sleep(LOOK_SECONDS)
                else:
                    self._something = trio.Event()
        finally:
            self._maybe_advisor = None
            advisor.end()

    def _look(self, advisor: _Advisor) -> None:
        """The block that was touched last first."""
        now = monotonic()
        for block, since in reversed(list(self._touched.items())):
            if self._give(advisor, block) or now - since > WAIT_SECONDS:
                del self._touched[block]

    def _give(self, advisor: _Advisor, block: int) -> bool:
        """What is empty of a block, if nothing of that is missing."""
        runs = list(fillplan.ready_runs(block, self._empty[block : min(block + BLOCK_PAGES, self._total_pages)]))
        if not all(self._at_hand(run.offset_bytes, run.length_bytes) for run in runs):
            return False
        advisor.give(runs)
        return True


class _Advisor:
    """A thread, from the first range on: asking the kernel may wait for what only the loop can do.

    The queue is the loop's to fill and the thread's to empty. Each of the counts has one writer: `_asked_pages` the
    thread, `_arrived_pages` the loop; so has `_id`, which is set before a READ can come of it.
    """

    def __init__(self, mounted: mountinfo.Mount) -> None:
        self._mounted = mounted
        self._queue: deque[PageRange] = deque(maxlen=MAX_BLOCKS)
        self._wake = threading.Event()
        self._arrived = threading.Event()
        self._maybe_thread: threading.Thread | None = None
        self._id = -1
        self._asked_pages = self._arrived_pages = 0
        self._over = False

    def takes(self, thread: int, size: int) -> bool:
        if thread != self._id:
            return False
        self._arrived_pages += size >> PAGE_SHIFT
        self._arrived.set()
        return True

    def give(self, runs: list[PageRange]) -> None:
        """Returns at once."""
        if self._over or not runs:
            return
        self._queue.extend(runs)
        self._wake.set()
        if self._maybe_thread is None:
            self._maybe_thread = threading.Thread(target=self._run, name="refused read-ahead", daemon=True)
            try:
                self._maybe_thread.start()
            except RuntimeError:  # no thread for us: the guest asks for each page
                self._over = True

    def end(self) -> None:
        """Returns at once; the thread ends a moment later."""
        self._over = True
        self._wake.set()
        self._arrived.set()

    # ---- the thread

    def _run(self) -> None:
        self._id = threading.get_native_id()
        try:
            while not self._over:
                self._wake.wait()
                self._work()
        except OSError as error:
            log.debug("refused read-ahead is left to the guest: %s", error)
            self._over = True
        finally:
            self._id = -1  # which may be another thread's soon

    def _work(self) -> None:
        """With the file open: until there has been nothing to do for a while."""
        file = OwnFile(self._mounted)
        try:
            while self._wake.wait(IDLE_SECONDS) and not self._over:
                self._wake.clear()
                while self._queue and not self._over:
                    if not file.is_mounted():
                        self._over = True
                        return
                    self._ask(file.fileno(), self._queue.popleft())
        finally:
            file.close()

    def _ask(self, descriptor: int, run: PageRange) -> None:
        self._wait_for_room()
        self._asked_pages += run.count
        with contextlib.suppress(OSError):  # it is only advice
            # The empty pages go first: what is there is not read again.
            os.posix_fadvise(descriptor, run.offset_bytes, run.length_bytes, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(descriptor, run.offset_bytes, run.length_bytes, os.POSIX_FADV_WILLNEED)

    def _wait_for_room(self) -> None:
        while self._asked_pages - self._arrived_pages >= MAX_OPEN_PAGES and not self._over:
            self._arrived.clear()
            if self._asked_pages - self._arrived_pages < MAX_OPEN_PAGES:
                return
            if not self._arrived.wait(ARRIVAL_SECONDS):
                self._asked_pages = self._arrived_pages
