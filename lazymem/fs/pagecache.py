"""Held pages brought into the kernel's page cache before the guest asks: its touch is then a minor fault, no request.

The kernel is asked (POSIX_FADV_WILLNEED) to read them through the mount's own file, with its own page locks, so nothing
that the guest has dirtied can be overwritten, whatever the order. Only pages go that are held, not zero, and that the
kernel has not had yet, each at most once: nothing is fetched for it, zeros fill no host memory, and a kernel that drops
pages is not made to read them in a circle.

What the guest does goes first. The kernel hands requests over in order, so few of ours are open at a time, and while
the guest asks for pages itself, or waits for one, hardly any. A READ carries the id of the thread that made the
kernel send it, so ours are told from the guest's exactly.

All state belongs to trio's thread; threads get descriptors and ranges, and set one number. See record 0009.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import trio
from msgspec import Struct

from lazymem.fs import fillplan, hostmemory, mountinfo
from lazymem.fs.ownfile import OwnFile
from lazymem.fs.tuning import MAX_BACKGROUND
from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, PageRange

log = logging.getLogger(__name__)

MAX_OPEN = MAX_BACKGROUND // 16
"""Requests of ours at a time where the guest asks for nothing: half a MiB, which is answered in a millisecond."""

CHUNK_PAGES = 4096
"""Looked over in one go, in some 10 us."""

CHUNKS_A_TURN = 32

MIN_ROUND_SECONDS = 0.2
MAX_ROUND_SECONDS = 2.0
"""Between two looks at what has come to be held: doubled while nothing comes."""

QUIET_SECONDS = 0.005
"""Without a READ of the guest's, after which it is thought to be at work on what it has."""

PATIENCE_SECONDS = 0.1
"""A guest that never is so quiet, since it touches one page after the other, is left alone so long for each step."""

DEMAND_SECONDS = 0.01
"""And so long a demand that waits holds us back. Over a slow link one always waits; the processor is then idle."""

LOOK_SECONDS = 0.001
ARRIVAL_SECONDS = 0.02
"""What has not become a request by then was in the kernel already."""

ANSWER_SECONDS = 1.0
"""A disk that is slower is not asked for more until then."""

MEMORY_LOOK_BYTES = 32 << 20
MEMORY_PAUSE_SECONDS = 1.0

FETCHING_SHARE = 3
"""While pages still come over the wire, so many times what a step took is left to that."""

MAX_DROPPED_READS = 64
"""The guest asked so often for what the kernel had got from us: it has no room, and more would push out more."""

CLOSE_SECONDS = 1.0

FILLED = "the kernel has it all"
"""The state in which there is nothing left to do."""


class HeldPages(Protocol):
    """What is known of the RAM's pages."""

    @property
    def total_pages(self) -> int: ...

    @property
    def held_pages(self) -> int: ...

    def fill_states(self, pages: PageRange) -> bytes:
        """One byte a page, as `fillplan` names them."""
        ...


class FillStatistics(Struct, frozen=True):
    """`reads`: READs that the kernel sent for us; the guest's are counted elsewhere. `dropped_reads`: the guest's, for
    pages that we had filled. `state`: for people."""

    state: str
    asked_pages: int
    reads: int
    dropped_reads: int


class PageCache:
    """Fills one mount's page cache from `held`: all of it if `everything`, else only what was preferred.

    `demands_wait`: whether a page that the guest needs now is on its way; `fetching`: whether any is.
    """

    def __init__(
        self,
        held: HeldPages,
        *,
        everything: bool,
        demands_wait: Callable[[], bool],
        fetching: Callable[[], bool],
        room: Callable[[int], float] = hostmemory.room_bytes,
    ) -> None:
        self._held = held
        self._everything = everything
        self._demands_wait = demands_wait
        self._fetching = fetching
        self._room = room
        self._preferred: list[PageRange] = []
        self._asked = mmap.mmap(-1, held.total_pages, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._brought = mmap.mmap(-1, held.total_pages, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._asked_pages = 0
        self._room_known_until = 0
        self._thread = 0  # of the step that is being made
        self._expected_bytes = 0
        self._arrived = trio.Event()
        self._held_pages = 0  # at the last round's begin
        self._reads = self._guest_reads = self._dropped_reads = 0
        self._guest_reads_before = 0  # at the last look
        self._guest_seen_at = -math.inf  # the last look that found new ones
        self._maybe_file: OwnFile | None = None
        self._is_done = False  # the last round found nothing to fill, nor anything that could become it
        self._over = False
        self._state = "nothing to do yet"

    # ---- told by others

    def takes(self, thread: int, offset: int, size: int) -> bool:
        """Whether the READ that thread `thread` made the kernel send is one of ours. To be asked once for each."""
        start, end = offset >> PAGE_SHIFT, (offset + size + PAGE_SIZE - 1) >> PAGE_SHIFT
        if thread == self._thread != 0:  # 0: a thread that we cannot see, outside of our pid namespace
            self._reads += 1
            self._brought[start:end] = b"\1" * (end - start)
            self._expected_bytes -= size
            if self._expected_bytes <= 0:
                self._arrived.set()
            return True
        self._guest_reads += 1
        if self._asked[start]:
            self._dropped_reads += 1
        if self._reads:
            self._brought[start:end] = bytes(end - start)
        return False

    def brought_at(self, pages: range) -> bytes:
        """One byte for each page number of `pages`, 1: the kernel got it by our READs alone. That the guest has touched
        such a page since is seen by nobody: it was there."""
        return self._brought[pages.start : pages.stop : pages.step]

    def prefer(self, ranges: Sequence[PageRange]) -> None:
        """These before others, in this order, once they are held."""
        self._preferred += ranges

    def statistics(self) -> FillStatistics:
        return FillStatistics(self._state, self._asked_pages, self._reads, self._dropped_reads)

    # ---- the task

    async def run(self, mounted: mountinfo.Mount, wish_to_end: trio.Event) -> None:
        """Fill until there is no more use in it: `wish_to_end`, an unmount, a kernel that drops what it gets; or all of
        the RAM is held and given."""
        try:
            while not await self._ran(mounted, wish_to_end):  # noqa: ASYNC110  # nobody tells of free threads
                await trio.sleep(MIN_ROUND_SECONDS)
        finally:
            self._thread = 0
            with trio.move_on_after(CLOSE_SECONDS, shield=True), contextlib.suppress(RuntimeError):
                await self._close()

    async def _ran(self, mounted: mountinfo.Mount, wish_to_end: trio.Event) -> bool:
        """Whether it came to its end; a host that has no thread for us (trio's RuntimeError) is no reason to end a
        mount, and the file must be closed in one."""
        try:
            await self._rounds(mounted, wish_to_end)
        except RuntimeError as error:
            self._thread = 0
            self._state = f"waits for a thread: {error}"
            return False
        return True

    async def _rounds(self, mounted: mountinfo.Mount, wish_to_end: trio.Event) -> None:
        pause = MIN_ROUND_SECONDS
        while True:
            held, self._held_pages = self._held_pages, self._held.held_pages
            await self._round(mounted, wish_to_end)
            await self._close()
            if self._everything and self._is_done and not self._over:
                self._stop(FILLED)
            if self._over:
                return
            pause = MIN_ROUND_SECONDS if held != self._held_pages else min(2 * pause, MAX_ROUND_SECONDS)
            await trio.sleep(pause)

    async def _round(self, mounted: mountinfo.Mount, wish_to_end: trio.Event) -> None:
        """All that is ready, in order."""
        self._is_done = True
        for count, chunk in enumerate(self._chunks(), 1):
            states = self._states(chunk)
            self._is_done = self._is_done and not any(states)
            if fillplan.READY in states:
                if self._maybe_file is None:
                    await self._open(mounted)
                await self._fill(chunk, wish_to_end)
            elif count % CHUNKS_A_TURN == 0:
                await trio.lowlevel.checkpoint()
            if self._over:
                return
        self._state = "waits until more is held"

    def _chunks(self) -> Iterator[PageRange]:
        self._preferred = [pages for pages in self._preferred if any(self._states(pages))]
        for pages in list(self._preferred):
            yield from pages.pieces(CHUNK_PAGES)
        if self._everything:
            yield from PageRange(0, self._held.total_pages).pieces(CHUNK_PAGES)

    def _states(self, pages: PageRange) -> bytes:
        return fillplan.without(self._held.fill_states(pages), self._asked[pages.start : pages.end])

    async def _fill(self, chunk: PageRange, wish_to_end: trio.Event) -> None:
        blocks = fillplan.blocks(chunk)
        while await self._may_go_on(wish_to_end):
            most = await self._turn()
            steps: list[PageRange] = []
            for block in blocks:
                steps += fillplan.ready_runs(block.start, self._states(block))
                if len(steps) >= most:
                    break
            if not steps:
                return
            await self._ask(steps)

    async def _may_go_on(self, wish_to_end: trio.Event) -> bool:
        if self._over or self._maybe_file is None:
            return False
        if wish_to_end.is_set():
            self._stop("the mount is to end")
        elif not self._maybe_file.is_mounted():
            self._stop("the mount is gone")
        elif self._dropped_reads > MAX_DROPPED_READS:
            self._stop("the kernel drops what it gets: there is no room for it")
        elif not await self._has_room():
            await self._close()
            self._state = "waits for free memory"
            await trio.sleep(MEMORY_PAUSE_SECONDS)
            return False
        return not self._over

    async def _has_room(self) -> bool:
        filled = self._asked_pages << PAGE_SHIFT
        if filled >= self._room_known_until:
            room = await trio.to_thread.run_sync(self._room, filled)
            if room <= 0:
                return False
            self._room_known_until = filled + int(min(room, MEMORY_LOOK_BYTES))
        return True

    async def _turn(self) -> int:
        """Wait until the guest asks for nothing; how many requests of ours it then does not mind."""
        give_up = trio.current_time() + PATIENCE_SECONDS
        while (busy := self._guest_is_busy()) and trio.current_time() < give_up:  # noqa: ASYNC110  # as above
            await trio.sleep(QUIET_SECONDS)
        if self._demands_wait():
            await trio.sleep(DEMAND_SECONDS)
            busy = True
        return 1 if busy else MAX_OPEN

    def _guest_is_busy(self) -> bool:
        """Whether it has asked for a page since the last look, or was seen to by one that is not long past: a step is
        over in a millisecond, and a guest that asks for nothing meanwhile is not quiet yet."""
        now = trio.current_time()
        if self._guest_reads != self._guest_reads_before:
            self._guest_reads_before = self._guest_reads
            self._guest_seen_at = now
        return now - self._guest_seen_at < QUIET_SECONDS

    async def _ask(self, steps: Sequence[PageRange]) -> None:
        """Have the kernel take `steps`; returns when it has got them, or is slow about it."""
        assert self._maybe_file is not None
        begun = trio.current_time()
        self._state = "filling"
        self._arrived = trio.Event()
        self._expected_bytes = sum(step.length_bytes for step in steps)
        await trio.to_thread.run_sync(self._advise, self._maybe_file.fileno(), steps)
        for step in steps:
            self._asked[step.start : step.end] = b"\1" * step.count
            self._asked_pages += step.count
        with trio.move_on_after(ARRIVAL_SECONDS):
            await self._arrived.wait()
        with trio.move_on_after(ANSWER_SECONDS):
            while any(fillplan.READY in self._held.fill_states(step) for step in steps):  # noqa: ASYNC110  # as above
                await trio.sleep(LOOK_SECONDS)
        self._thread = 0
        if self._fetching():
            await trio.sleep(FETCHING_SHARE * (trio.current_time() - begun))

    def _advise(self, descriptor: int, steps: Sequence[PageRange]) -> None:
        """In a thread: the kernel allocates the pages and sends requests, which the loop answers meanwhile."""
        self._thread = threading.get_native_id()
        for step in steps:
            with contextlib.suppress(OSError):  # it is only advice
                # Read-ahead that was refused has left empty pages behind, and what is there is not read again.
                os.posix_fadvise(descriptor, step.offset_bytes, step.length_bytes, os.POSIX_FADV_DONTNEED)
                os.posix_fadvise(descriptor, step.offset_bytes, step.length_bytes, os.POSIX_FADV_WILLNEED)

    async def _open(self, mounted: mountinfo.Mount) -> None:
        try:
            self._maybe_file = await trio.to_thread.run_sync(OwnFile, mounted, abandon_on_cancel=True)
        except OSError as error:
            log.debug("held pages are not brought into the kernel's cache ahead of the guest: %s", error)
            self._stop(f"cannot open the mount's own file: {error.strerror or error}")

    async def _close(self) -> None:
        """In a thread that nobody waits for once we are cancelled: the last close ends an unmounted file system."""
        if self._maybe_file is not None:
            file, self._maybe_file = self._maybe_file, None
            try:
                await trio.to_thread.run_sync(file.close, abandon_on_cancel=True)
            except RuntimeError:
                self._maybe_file = file
                raise

    def _stop(self, why: str) -> None:
        self._over = True
        self._state = why
        log.debug("the kernel's cache is filled no more: %s", why)
