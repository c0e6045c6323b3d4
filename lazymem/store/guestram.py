"""The guest's RAM as the mount shows it: the snapshot's pages with this run's written pages over them.

Fetched and written pages are in different files, so a fetched page can never replace a written one on disk; what
remains of rule 1 is that a *read* that waited must not return what was there before a write that ended meanwhile. Each
waiting read is therefore known here, and each write that ends marks its pages in the reads that overlap; they read
those pages again before they return.

One write at a time a page: a part of a page is merged with the page's bytes, and nobody may change those in between.
A write is acknowledged (returns) when its bytes are in the state file and its map says so, in this order. On a full
disk it makes room (`room`) or waits for it, and on a dying one it waits, too: the kernel forgets the bytes of a
write-back that failed, without a word to a guest that only has the file mapped, and would read older ones later.
A read that meets written pages which the disk does not give back waits as well: nobody else has them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from operator import or_

import trio

from lazymem.errors import LazymemError, StoreError, TemplateWriteError, VerificationError
from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, PageRange, PageRun, covering, runs
from lazymem.store.pagemap import SET_ZERO, UNSET
from lazymem.store.pristine import PristinePages
from lazymem.store.rangelocks import RangeLocks
from lazymem.store.readplan import Place, plan
from lazymem.store.room import Room
from lazymem.store.runfiles import RunFiles
from lazymem.store.source import PageDemand
from lazymem.store.statefiles import StateFolder
from lazymem.store.stats import StoreStatistics
from lazymem.store.threads import in_thread_at_last

log = logging.getLogger(__name__)

OnRead = Callable[[bytes | memoryview | LazymemError | None], None]
Put = Callable[[PageRange, bytes | memoryview], None]


class _Reading:
    """A read that waits: `stale` are the pages that a write changed since it began."""

    __slots__ = ("pages", "stale")

    def __init__(self, pages: PageRange) -> None:
        self.pages = pages
        self.stale: set[int] = set()


class GuestRam:
    """Reads and writes of one run. Takes `pristine` and `state` over.

    `state` None makes it a template: its bytes never change, writes are refused. `deadline_seconds`: for a read that
    waits for the disk with written pages; None waits for ever.
    """

    def __init__(
        self,
        pristine: PristinePages,
        state: StateFolder | None,
        demand: PageDemand,
        deadline_seconds: float | None = None,
    ) -> None:
        self._pristine = pristine
        self._state = state
        self._demand = demand
        self.run_files = RunFiles(pristine, state.written if state is not None else None, demand)
        self._locks = RangeLocks()
        self._readings: set[_Reading] = set()
        self._reads = self._reads_at_hand = self._demanded_pages = 0
        self._writes = self._merged_pages = 0
        self._maybe_room = Room(state, pristine.cache, deadline_seconds) if state is not None else None
        # Not trio's own limiter: a stalled disk under many syncs would take all of its threads, and reads need some.
        self._syncers = trio.CapacityLimiter(1)
        self._sync_lock = trio.Lock()

    @property
    def template(self) -> bool:
        return self._state is None

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should read at the start."""
        return self._state.notices if self._state else ()

    @property
    def total_pages(self) -> int:
        return self._pristine.total_pages

    @property
    def size_bytes(self) -> int:
        return self.total_pages * PAGE_SIZE

    @property
    def held_pages(self) -> int:
        return self._pristine.held_pages

    @property
    def written_pages(self) -> int:
        return self._state.written.count if self._state else 0

    def written_at(self, pages: range) -> bytes:
        """One byte for each page number of `pages`, 0: the guest did not write it."""
        return self._state.written.states_at(pages) if self._state else bytes(len(pages))

    @property
    def is_whole(self) -> bool:
        """Whether no page is missing any more. Looks at a byte a page up to the first one that is."""
        return self._pristine.next_missing(PageRange(0, self._pristine.total_pages), 1) is None

    def statistics(self) -> StoreStatistics:
        candidates = self._pristine.maybe_candidates
        return StoreStatistics(
            total_pages=self.total_pages,
            held_pages=self.held_pages,
            written_pages=self.written_pages,
            reads=self._reads,
            reads_at_hand=self._reads_at_hand,
            demanded_pages=self._demanded_pages,
            writes=self._writes,
            merged_pages=self._merged_pages,
            dropped_pages=self._pristine.dropped_pages,
            shed_pages=self._maybe_room.shed_pages if self._maybe_room else 0,
            waiting_writes=self._maybe_room.waiting_writes if self._maybe_room else 0,
            reserved_bytes=self._state.reserve.bytes_left if self._state and self._state.reserve else 0,
            candidates_used=candidates.used_pages if candidates else 0,
            candidates_refused=candidates.refused_pages if candidates else 0,
        )

    def read_soon(self, offset: int, length: int, done: OnRead) -> bytes | bool:
        """`length` bytes from byte `offset` on, if all of them are at hand. True: they are one run of missing pages and
        were demanded; `done` is called once, later, with the bytes, or the error, or None where `read` must be asked.
        False: nothing was begun, and only `read` can tell. `offset + length` lies inside the RAM."""
        start, count = offset >> PAGE_SHIFT, length >> PAGE_SHIFT
        if count << PAGE_SHIFT != length or start << PAGE_SHIFT != offset:
            return False
        pages = PageRange(start, count)
        if self._state is None or self._state.written.all_unset(pages):
            if self._pristine.none_held(pages):
                return self._start_missing(pages, done)
            if count == 1 and (zeros := self._pristine.maybe_zero_page(pages)) is not None:
                self._reads += 1
                self._reads_at_hand += 1
                return zeros
            data = self._pristine.maybe_read_held_nowait(pages)
            if data is not None:
                self._reads += 1
                self._reads_at_hand += 1
                self._pristine.given(pages)
                return data
        data = self._maybe_at_hand(pages)
        if data is None:
            return False
        self._reads += 1
        return data

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from byte `offset` on, fewer at the end. No checkpoint when all of them are at hand.

        Waits for missing pages as long as `PageDemand` does.

        Raises:
            VerificationError, DeadlineError: from the demand, for any of the pages.
            DeadlineError: the disk refused written pages for so long.
        """
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return b""
        pages = covering(offset, length)
        self._reads += 1
        data = self._maybe_at_hand(pages)
        if data is None:
            planned = self._plan(pages)
            data = await self._read_waiting(pages)
            self._given(planned)
        if len(data) == length:
            return data
        start = offset - pages.offset_bytes
        return data[start : start + length]

    def is_at_hand(self, offset: int, length: int) -> bool:
        """Whether no page of these bytes, which lie inside the RAM, has to be fetched."""
        pages = covering(offset, length)
        states = self._pristine.states(pages)
        if UNSET not in states:
            return True
        return self._state is not None and all(map(or_, states, self._state.written.states(pages)))

    def _maybe_at_hand(self, pages: PageRange) -> bytes | None:
        planned = self._plan(pages)
        data = self._maybe_read_nowait(planned)
        if data is not None:
            self._reads_at_hand += 1
            self._given(planned)
        return data

    def _start_missing(self, pages: PageRange, done: OnRead) -> bool:
        """Demand `pages`, none of which is here, and give the answer as it is. The commonest fault, and the barest."""

        def entered() -> Callable[[list[PageRun] | LazymemError], None]:
            return self._waiting_for(pages, done)

        if not self._demand.start(pages, done, entered):
            return False
        self._reads += 1
        self._demanded_pages += pages.count
        return True

    def _waiting_for(self, pages: PageRange, done: OnRead) -> Callable[[list[PageRun] | LazymemError], None]:
        """Who is told what a demand of `pages` brings, while writes may end meanwhile."""
        reading = _Reading(pages)

        def arrived(answer: list[PageRun] | LazymemError) -> None:
            self._readings.discard(reading)
            if isinstance(answer, LazymemError):
                done(answer)
            elif reading.stale:
                done(None)
            elif not _is_exact(pages, answer):
                done(_other_pages(pages))
            else:
                done(_joined(answer))
                self._pristine.given(pages)

        self._readings.add(reading)
        return arrived

    def _given(self, planned: list[tuple[Place, PageRange]]) -> None:
        """The kernel gets these: rule 12."""
        for place, run in planned:
            if place is Place.WRITTEN and self._state is not None:
                self._state.ram.let_go(run)
            elif place is not Place.ZERO:
                self._pristine.given(run)

    def is_unseen(self, offset: int, length: int) -> bool:
        """Whether none of these pages was read since we began, or written. (Of zero ones nobody notes that.)"""
        pages = covering(offset, length)
        if self._state is not None and not self._state.written.all_unset(pages):
            return False
        given = self._pristine.given_at(range(pages.start, pages.end))
        return not given.strip(b"\0") and SET_ZERO not in self._pristine.states(pages)

    async def write(self, offset: int, data: bytes, storing: Callable[[], None] | None = None) -> None:
        """Put `data` at byte `offset`; returns when it is in the state file, which outlives this process. `storing` is
        called when it has all that it needs for that: cancelled before then, it changed nothing.

        Parts of missing pages wait for the fetched page, and all of it waits for a full or dying disk. A cancelled
        write is done wholly or not at all, a failed one may have changed bytes of pages that the guest wrote before.

        Raises:
            TemplateWriteError: this is a template.
            StoreError: `data` reaches beyond the RAM, or the disk refused what it will never take.
            VerificationError, DeadlineError: from the demand for a page that is written in part.
        """
        if self._state is None:
            raise TemplateWriteError("this mount is a template: its bytes never change")
        if offset < 0 or offset + len(data) > self.size_bytes:
            raise StoreError(f"a write of {len(data)} bytes at {offset} reaches beyond the RAM of {self.size_bytes}")
        if not data:
            return
        pages = covering(offset, len(data))
        async with self._locks.hold(pages):
            merged_offset, merged = await self._merge(self._state, offset, data)
            assert self._maybe_room is not None, "there is a state folder"
            if storing is not None:
                storing()
            await self._maybe_room.store(pages, merged_offset, merged)
            # A read that ended since the map was changed, a thread's work ago, came before this write, which nobody was
            # told of yet. What waits still has to see it.
            self._mark_stale(pages)
            self._writes += 1

    async def sync(self) -> None:
        """What was written before the call reaches the disk.

        Raises:
            StoreError: the disk refused.
        """
        if self._state is not None:
            async with self._sync_lock:
                await self._state.sync(self._syncers)

    async def close(self) -> None:
        """Sync (unless the run ends here) and let all files go. No read or write may be open, none may follow."""
        with trio.CancelScope(shield=True):
            try:
                if self._state is not None and not self._state.private:
                    await self.sync()
                    await in_thread_at_last(self._syncers, self._state.note_whole)
            finally:
                self._pristine.close()
                if self._state is not None:
                    await in_thread_at_last(self._syncers, self._state.close)

    def _plan(self, pages: PageRange) -> list[tuple[Place, PageRange]]:
        written = self._state.written.states(pages) if self._state else bytes(pages.count)
        return plan(pages, self._pristine.states(pages), written)

    def _maybe_read_nowait(self, planned: list[tuple[Place, PageRange]]) -> bytes | None:
        if len(planned) == 1:
            return self._maybe_piece_nowait(*planned[0])
        pieces = []
        for place, run in planned:
            piece = self._maybe_piece_nowait(place, run)
            if piece is None:
                return None
            pieces.append(piece)
        return b"".join(pieces)

    def _maybe_piece_nowait(self, place: Place, run: PageRange) -> bytes | None:
        if place is Place.CACHED:
            return self._pristine.maybe_read_nowait(run)
        if place is Place.ZERO:
            return self._pristine.maybe_zeros(run)
        if place is Place.WRITTEN and self._state is not None:
            return self._state.ram.maybe_read_nowait(run.offset_bytes, run.length_bytes)
        return None

    async def _read_waiting(self, pages: PageRange) -> bytes:
        reading = _Reading(pages)
        self._readings.add(reading)
        try:
            buffer = bytearray(pages.length_bytes)
            await self._gather(pages, buffer, pages)
            return await self._refreshed(reading, buffer)
        finally:
            self._readings.discard(reading)

    async def _refreshed(self, reading: _Reading, buffer: bytearray) -> bytes:
        """`buffer`, which holds `reading.pages`, with the pages in it read again that writes have changed."""
        while reading.stale:
            again = runs(reading.stale)
            reading.stale.clear()
            for run in again:
                await self._gather(run, buffer, reading.pages)
        return bytes(buffer)

    async def _gather(self, wanted: PageRange, buffer: bytearray, whole: PageRange) -> None:
        """Put the bytes of `wanted` at their places in `buffer`, which holds `whole`."""

        def put(run: PageRange, data: bytes | memoryview) -> None:
            at = run.offset_bytes - whole.offset_bytes
            buffer[at : at + run.length_bytes] = data

        missing = [wanted]
        unusable: list[PageRange] = []
        while missing:
            planned = [found for run in missing for found in self._plan(run)]
            missing = [run for place, run in planned if place is Place.MISSING]
            if len(missing) == len(planned):
                break
            # While these are read others may come, and would be fetched a second time.
            unusable += await self._put_held(planned, put)
        for page_run in await self._demand_all([*missing, *unusable]):
            put(page_run.pages, page_run.data if page_run.data is not None else bytes(page_run.pages.length_bytes))

    async def _put_held(self, planned: list[tuple[Place, PageRange]], put: Put) -> list[PageRange]:
        """Give `put` the bytes of what is here; returns the runs of it that are to be fetched all the same."""
        unusable: list[PageRange] = []
        for place, run in planned:
            if place is Place.WRITTEN and self._maybe_room is not None:
                put(run, await self._maybe_room.read(run))
            elif place is Place.CACHED:
                data, wrong = await self._pristine.read(run)
                put(run, data)
                unusable.extend(wrong)
            elif place is Place.ZERO:
                zeros = self._pristine.maybe_zeros(run)
                if zeros is None:
                    unusable.append(run)
                else:
                    put(run, zeros)
        return unusable

    async def _demand_all(self, missing: Sequence[PageRange]) -> list[PageRun]:
        """Demand all runs at the same time; the first error ends the others."""
        self._demanded_pages += sum(run.count for run in missing)
        if len(missing) <= 1:
            return [found for run in missing for found in await self._demand_exactly(run)]
        found: list[PageRun] = []
        errors: list[LazymemError] = []

        async def one(run: PageRange) -> None:
            try:
                found.extend(await self._demand_exactly(run))
            except LazymemError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for run in missing:
                nursery.start_soon(one, run)
        if errors:
            raise errors[0]
        return found

    async def _demand_exactly(self, pages: PageRange) -> list[PageRun]:
        answer = await self._demand.demand(pages)
        if not _is_exact(pages, answer):
            raise _other_pages(pages)
        return answer

    async def _merge(self, state: StateFolder, offset: int, data: bytes) -> tuple[int, bytes]:
        """`data` with what it must bring along to fill pages that are not written yet; and where that goes."""
        pages = covering(offset, len(data))
        head = offset - pages.offset_bytes
        tail = pages.offset_bytes + pages.length_bytes - offset - len(data)
        ends: dict[int, bytes] = {}
        wanted = ([pages.start] if head else []) + ([pages.end - 1] if tail else [])
        for page in dict.fromkeys(wanted):
            if state.written.all_unset(PageRange(page, 1)):
                # Nobody writes this page before we let it go, so it stays as it is read here.
                ends[page] = await self._read_page(page)
        self._merged_pages += len(ends)
        if head and pages.start in ends:
            data = ends[pages.start][:head] + data
            offset -= head
        if tail and pages.end - 1 in ends:
            data += ends[pages.end - 1][PAGE_SIZE - tail :]
        return offset, data

    async def _read_page(self, page: int) -> bytes:
        pages = PageRange(page, 1)
        data = self._maybe_read_nowait(self._plan(pages))
        return data if data is not None else await self._read_waiting(pages)

    def _mark_stale(self, pages: PageRange) -> None:
        for reading in self._readings:
            overlap = range(max(pages.start, reading.pages.start), min(pages.end, reading.pages.end))
            reading.stale.update(overlap)


def _is_exact(pages: PageRange, answer: Sequence[PageRun]) -> bool:
    """Whether `answer` covers `pages` and nothing else, in order, with as many bytes."""
    at = pages.start
    for run in answer:
        if run.pages.start != at or (run.data is not None and len(run.data) != run.pages.length_bytes):
            return False
        at = run.pages.end
    return at == pages.end


def _other_pages(pages: PageRange) -> VerificationError:
    """Reading on would show zeros where the snapshot has other bytes."""
    return VerificationError(f"pages {pages.start} to {pages.end - 1} were demanded, and others came")


def _joined(found: list[PageRun]) -> bytes:
    if len(found) == 1 and isinstance(found[0].data, bytes):
        return found[0].data
    return b"".join([run.data if run.data is not None else bytes(run.pages.length_bytes) for run in found])
