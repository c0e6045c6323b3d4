"""The snapshot's own pages, as far as they are here: the verified cache, and the sink that fetched pages go into.

Every page is verified twice: when it is fetched (`accept`), and each time it is read back from the cache's file, which
others share and anybody may damage. A page that fails the second check is dropped, and fetched again like any other
that is missing.

What digests prove to be zero is held from then on: whole leaves by the upper level, at mount, and the zero pages of a
leaf when its block comes. Pages of a leaf that are equal to held ones are copied from those, not fetched.

Several mounts, in several processes, may use one folder: bytes go into the file before the map says so, and whoever
comes second writes the same verified bytes.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from operator import gt, or_
from time import perf_counter

import trio

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, ZERO_PAGE_DIGEST, TreeShape
from lazymem.errors import StoreError
from lazymem.pages import PAGE_SIZE, ZERO_PAGE, Fetched, PageRange, PageRun, runs
from lazymem.store.cachefolder import CacheFolder
from lazymem.store.candidates import Candidates
from lazymem.store.copies import Copies
from lazymem.store.mendable import is_short
from lazymem.store.origin import RamOrigin
from lazymem.store.pagefile import BLOCK_PAGES
from lazymem.store.pagemap import SET, SET_ZERO, UNSET, PageMap
from lazymem.store.verify import HashedVerifier, UnhashedVerifier, Verifier, is_right, wrong_pages, zero_runs

MARK_PAGES = 1 << 20
"""1 MiB of the map at a time, of what may be 16 MiB for 64 GiB of zeros."""

RUNS_A_TURN = 32
TURN_SECONDS = 0.0003
"""Kept between two looks at what else there is to do: a third of a millisecond, which a fault may have to wait."""

COPIES_PAY_BELOW_BYTES_PER_SECOND = 150e6
"""A copy (look, read, verify, write) costs 25 us, which is a page's time on a wire this fast; and a wire leaves the
processor alone meanwhile."""

MAX_GIVEN_EARLY = 1024
"""Readers' ranges whose pages are not kept yet; of more, the oldest stay cached twice until the kernel wants room."""


_SET = bytes((SET,))
_HELD = bytes((SET, SET_ZERO))
_FILL_STATES = bytes({UNSET: 2, SET: 1}.get(state, 0) for state in range(256))
_MAY_HAVE_DATA = bytes(state != SET_ZERO for state in range(256))


class PristinePages:
    """Implements `source.PageSink`. Takes `cache` over.

    `upper`: the digest tree's upper level, 16 bytes a leaf, for a hashed snapshot; unused for an unhashed one.
    `written`: this run's written pages, which nobody needs from the source any more.

    Raises:
        VerificationError: `upper` is not the one under the snapshot's root.
        StoreError: the disk refused.
    """

    def __init__(
        self,
        origin: RamOrigin,
        cache: CacheFolder,
        upper: bytes = b"",
        written: PageMap | None = None,
        maybe_candidates: Candidates | None = None,
    ) -> None:
        """`maybe_candidates`: of an unhashed snapshot; taken over."""
        self._origin = origin
        self.maybe_candidates = maybe_candidates
        self._written = written
        self._cache = cache
        self._verifier: Verifier
        self._maybe_copies: Copies | None = None
        if origin.root is None:
            self._verifier = UnhashedVerifier(origin.shape, cache.digests)
        else:
            self._verifier = HashedVerifier(origin.shape, origin.root, upper, cache.digests)
            self._maybe_copies = Copies(cache.held, written, self._verifier.digests_of, self._maybe_read_one)
            if cache.digests.maybe_upper(origin.root) is None:
                cache.digests.store_upper(upper)
            self._mark_zeros(self._verifier.zero_leaves())
        self.maybe_upper = None if origin.root is None else bytes(upper)
        """The digest tree's upper level, verified; None for an unhashed snapshot."""
        self.wire_bytes_per_second: Callable[[], float] = lambda: 0.0
        """What guesses come by: where that is slow, equal pages are copied from each other. For the owner to set."""
        self._dropped_pages = 0
        # One byte a page; memory only where one is set, which a bytearray would not do.
        self._given = mmap.mmap(-1, origin.pages, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._given_early: deque[PageRange] = deque(maxlen=MAX_GIVEN_EARLY)

    @property
    def total_pages(self) -> int:
        return self._origin.pages

    @property
    def held_pages(self) -> int:
        return self._cache.held.count

    def learn_held(self, pages: int) -> None:
        """Another process that fills the same cache counted so many held pages."""
        self._cache.held.learn_count(pages)

    def recount(self) -> int:
        """Held pages, with what other processes held. Blocking: reads the map, 16 MiB for 64 GiB of RAM.

        Raises:
            StoreError: the disk does not give the map back.
        """
        return self._cache.held.recount()

    @property
    def dropped_pages(self) -> int:
        """Cached pages that did not have their digest when they were read back."""
        return self._dropped_pages

    @property
    def cache(self) -> CacheFolder:
        """Its files."""
        return self._cache

    @property
    def shape(self) -> TreeShape:
        return self._origin.shape

    def maybe_leaf(self, leaf: int) -> bytes | None:
        """The page digests of a leaf, verified, if they are here. Hashed snapshots only."""
        pages = PageRange(leaf * LEAF_PAGES, self.shape.leaf_pages(leaf))
        return None if self._verifier.missing_leaves(pages) else self._verifier.digests_of(pages)

    def states(self, pages: PageRange) -> bytes:
        """One byte a page: what the cache's map says."""
        return self._cache.held.states(pages)

    def none_held(self, pages: PageRange) -> bool:
        """Whether every page of `pages` is missing."""
        return self._cache.held.all_unset(pages)

    def missing_runs(self, pages: PageRange) -> Iterator[PageRange]:
        """The runs within `pages` that are not held, in order."""
        return self._cache.held.unset_runs(pages)

    def next_missing(self, pages: PageRange, limit: int) -> PageRange | None:
        start, end = pages.start, min(pages.end, self.total_pages)  # a recorded set's blocks may reach beyond it
        while start < end:
            start = self._cache.held.first_unset(start, end)
            unwritten = self._written.first_unset(start, end) if self._written else start
            if unwritten == start < end:
                stop = self._cache.held.first_set(start, min(start + limit, end))
                if self._written:
                    stop = self._written.first_set(start, stop)
                if stop > start:  # or the process that fills has set it just now
                    return PageRange(start, stop - start)
            start = unwritten
        return None

    def next_to_guess(self, pages: PageRange, limit: int) -> PageRange | None:
        """As `next_missing`, of pages that may be asked for without being waited for: a candidate that is not decided
        may turn out right."""
        found = self.next_missing(pages, limit)
        candidates, end = self.maybe_candidates, pages.end
        while found is not None and candidates is not None:
            decided = candidates.first_decided(found.start, end)
            if decided == found.start:
                return candidates.decided_parts(found)[0]
            found = self.next_missing(PageRange(decided, end - decided), limit) if decided < end else None
        return found

    def missing_leaves(self, pages: PageRange) -> bool:
        return self._verifier.missing_leaves(pages)

    def maybe_digests(self, pages: PageRange) -> bytes | None:
        return self._verifier.maybe_digests(pages)

    def accept(self, fetched: Fetched) -> None:
        self._verifier.accept(fetched)

    def know_sums(self, sums: bytes, digest: bytes) -> None:
        """As `LeafSums`: from now on, leaves that come whole are verified at once."""
        assert isinstance(self._verifier, HashedVerifier), "there is a manifest"
        self._verifier.know_sums(sums, digest, self._maybe_held_nowait)

    def _maybe_held_nowait(self, pages: PageRange) -> bytes | None:
        """Not verified."""
        if self._cache.held.states(pages).strip(_SET):
            return None
        return self._cache.pages.maybe_read_nowait(pages.offset_bytes, pages.length_bytes)

    async def keep(self, fetched: Fetched) -> None:
        """Write accepted pages to the cache's file, then mark them held.

        Raises:
            StoreError: the disk refused; pages that are not marked are simply missing.
        """
        pieces: list[tuple[int, bytes | memoryview]] = []
        marks: list[tuple[PageRange, int]] = []
        for count, run in enumerate(fetched.runs, 1):
            for part, data in _split_zeros(run, self._verifier.digests_of(run.pages)):
                marks.append((part, SET if data is not None else SET_ZERO))
                if data is not None:
                    pieces.append((part.offset_bytes, data))
            if count % RUNS_A_TURN == 0:
                await trio.lowlevel.checkpoint()
        leaves = self._verifier.store(fetched)
        turn_ends = perf_counter() + TURN_SECONDS
        for first, digests in leaves:
            self._mark_zeros(zero_runs(first, digests))
            if perf_counter() > turn_ends:  # not after each: others may take ten times as long for their turns
                await trio.lowlevel.checkpoint()
                turn_ends = perf_counter() + TURN_SECONDS
        if pieces:
            await self._cache.pages.write_many(pieces)
        for at in range(0, len(marks), RUNS_A_TURN):
            self._hold(marks[at : at + RUNS_A_TURN])
            await trio.lowlevel.checkpoint()
        if self._maybe_copies is not None and self.copies_pay:
            for first, digests in leaves:
                self._maybe_copies.note_leaf(first, digests)
            await self._copy_some(self._maybe_copies)
        await self._let_go_of_kept()

    def _hold(self, marks: list[tuple[PageRange, int]]) -> None:
        self._cache.held.set_many(marks)
        copies = self._maybe_copies
        if copies is not None:
            for part, state in marks:
                if state == SET:
                    if self.copies_pay:
                        copies.note_held(part)
                    copies.arrived(part)

    def maybe_read_nowait(self, pages: PageRange) -> bytes | None:
        """Verified bytes of pages that the map calls `SET`, if the kernel has them at hand and they are right."""
        data = self._cache.pages.maybe_read_nowait(pages.offset_bytes, pages.length_bytes)
        return data if data is not None and not self._drop_wrong(pages, data) else None

    def maybe_read_held_nowait(self, pages: PageRange) -> bytes | None:
        """Verified bytes of `pages` in one piece, if all of them are held, at hand and right; zero pages are holes of
        the file. Otherwise nothing is dropped: whoever then looks run by run sees which one is wrong."""
        states = self._cache.held.states(pages)
        if states.strip(_HELD):
            return None
        if states.count(SET_ZERO) == len(states):
            return self.maybe_zeros(pages)
        data = self._cache.pages.maybe_read_nowait(pages.offset_bytes, pages.length_bytes)
        return data if data is not None and is_right(data, self._verifier.digests_of(pages)) else None

    def maybe_zero_page(self, page: PageRange) -> bytes | None:
        """One page of zeros, if the map calls `page` zero and its digest says so too. Nothing of it is in a file, so
        nobody has to hear that it was given."""
        if self._cache.held.states(page)[0] != SET_ZERO or self._verifier.digests_of(page) != ZERO_PAGE_DIGEST:
            return None
        return ZERO_PAGE

    def maybe_zeros(self, pages: PageRange) -> bytes | None:
        """Verified bytes of pages that the map calls `SET_ZERO`, if it is right."""
        return bytes(pages.length_bytes) if not self._drop_wrong(pages, None) else None

    async def read(self, pages: PageRange) -> tuple[bytes, list[PageRange]]:
        """Bytes of pages that the map calls `SET`, and the runs among them that are to be fetched: wrong ones, which
        are dropped, and those that this host has no means to read just now."""
        try:
            data = await self._cache.pages.read(pages.offset_bytes, pages.length_bytes)
        except StoreError as error:
            # A cache that cannot be read is as good as none: the source has every page.
            if not is_short(error):
                self.drop(pages)
                self._dropped_pages += pages.count
            return bytes(pages.length_bytes), [pages]
        return data, self._drop_wrong(pages, data)

    def held_at(self, pages: range) -> bytes:
        """One byte for each page number of `pages`, 0: it is missing."""
        return self._cache.held.states_at(pages)

    def given_at(self, pages: range) -> bytes:
        """One byte for each page number of `pages`, 0: the guest's kernel never asked for it."""
        return self._given[pages.start : pages.stop : pages.step]

    def fill_states(self, pages: PageRange) -> bytes:
        """One byte a page, for who fills the guest's kernel ahead of it: 1 held, with data; 2 missing; 0 nothing to
        fill, since it is zero, the guest wrote it, or its kernel has had it."""
        states = self._cache.held.states(pages).translate(_FILL_STATES)
        if not states.strip(b"\0"):
            return states
        done = int.from_bytes(self._given[pages.start : pages.end], "little")
        if self._written is not None:
            done |= int.from_bytes(self._written.states(pages), "little")
        return (int.from_bytes(states, "little") & ~(3 * done)).to_bytes(pages.count, "little")

    def given(self, pages: PageRange) -> None:
        """The guest's kernel has got `pages`, from here or on their way here."""
        start, end = pages.start, pages.end
        self._given[start:end] = b"\1" * pages.count
        if UNSET in self._cache.held.states(pages):
            self._given_early.append(pages)
            return
        if not start % BLOCK_PAGES and not end % BLOCK_PAGES:
            self._cache.pages.let_go(pages)
            return
        first = start - start % BLOCK_PAGES
        block = PageRange(first, min(-end % BLOCK_PAGES + end, self.total_pages) - first)
        # Of a block that is not done, this helps only if they came into the file by themselves.
        self._cache.pages.let_go(block if self._is_done(block) else pages)

    def _is_done(self, block: PageRange) -> bool:
        """Whether nobody will read any page of `block` from the cache's file. What is missing may come: the kernel is
        asked to let go of what is named for a second, and would drop what comes in that time."""
        left = self._cache.held.states(block).translate(_MAY_HAVE_DATA)
        done = self._given[block.start : block.end]
        if self._written is not None and not self._written.all_unset(block):  # by the guest: read from its own file
            done = bytes(map(or_, done, self._written.states(block)))
        return not any(map(gt, left, done))

    async def _let_go_of_kept(self) -> None:
        for count in range(1, len(self._given_early) + 1):
            self.given(self._given_early.popleft())
            if count % RUNS_A_TURN == 0:
                await trio.lowlevel.checkpoint()

    def drop(self, pages: PageRange) -> None:
        """Call `pages` missing again; they stay verified against the same digests.

        Where the disk refuses that, wrong ones are found wrong again when they are next read.
        """
        with contextlib.suppress(StoreError):
            self._cache.held.set(pages, UNSET)

    def _mark_zeros(self, proven: Iterable[PageRange]) -> None:
        """Pages that must be zero, by verified digests, are as good as held: nobody asks the source for them.

        Marked in steps, since a map's change costs a copy of its length; a look for single holes costs ten times that.
        """
        for run in proven:
            for piece in run.pieces(MARK_PAGES):
                if self.states(piece) == bytes(piece.count):  # UNSET, all of them
                    self._cache.held.set(piece, SET_ZERO)
                else:
                    self._cache.held.set_many([(hole, SET_ZERO) for hole in self.missing_runs(piece)])

    def worth_fetching(self, pages: PageRange) -> list[PageRange]:
        """The parts of missing `pages` to guess. What is equal to a held page is copied instead (`copy_equal`), what is
        equal to one that was let through here when that one is held; what has a candidate waits for its digest."""
        if self.maybe_candidates is not None:
            return self.maybe_candidates.decided_parts(pages)
        if self._maybe_copies is None or not self.copies_pay:
            return [pages]
        return self._maybe_copies.worth_fetching(pages)

    @property
    def copies_pay(self) -> bool:
        return self.wire_bytes_per_second() < COPIES_PAY_BELOW_BYTES_PER_SECOND

    @property
    def has_copies(self) -> bool:
        """Whether `copy_equal` has something to do."""
        return self._maybe_copies is not None and bool(self._maybe_copies.found)

    async def copy_equal(self) -> None:
        """Hold the pages that were found to be held elsewhere. Where those turn out not to be right, both are missing
        afterwards.

        Raises:
            StoreError: the disk refused.
        """
        while self._maybe_copies is not None and self._maybe_copies.found:
            await self._copy_some(self._maybe_copies)

    async def _copy_some(self, copies: Copies) -> None:
        found = await copies.some()
        if found:
            await self._cache.pages.write_many([(here.offset_bytes, data) for here, data in found])
            self._hold(sorted((here, SET) for here, _ in found))

    async def _maybe_read_one(self, held: PageRange) -> bytes | None:
        maybe_data = self.maybe_read_nowait(held)
        if maybe_data is None and self.states(held)[0] == SET:  # not at hand
            data, wrong = await self.read(held)
            maybe_data = None if wrong else data
        return maybe_data

    def _drop_wrong(self, pages: PageRange, data: bytes | None) -> list[PageRange]:
        wrong = runs(wrong_pages(pages, data, self._verifier.digests_of(pages)))
        for run in wrong:
            self.drop(run)
            self._dropped_pages += run.count
        return wrong

    # ---- candidates

    def vouch(self, first_page: int, digests: bytes) -> None:
        """The server of an unhashed snapshot vouches for pages that it did not send: 16 bytes a page, `NO_DIGEST` where
        it does not. What it says is zero is held from now on.

        Raises:
            VerificationError: it vouched for something else before; nothing was learnt.
            StoreError: the disk refused.
        """
        assert isinstance(self._verifier, UnhashedVerifier), "the digests of a hashed snapshot hang together"
        self._verifier.vouch(first_page, digests)
        self._mark_zeros(zero_runs(first_page, digests))

    def right_parts(self, run: PageRun) -> list[PageRun]:
        """The parts of a run, from wherever it is, that have the digests that are known by now."""
        wrong = set(wrong_pages(run.pages, run.data, self._verifier.digests_of(run.pages)))
        return [run] if not wrong else _without(run, wrong)

    def close(self) -> None:
        self._cache.close()
        if self.maybe_candidates is not None:
            self.maybe_candidates.close()


def _without(run: PageRun, wrong: set[int]) -> list[PageRun]:
    parts = runs(page for page in range(run.pages.start, run.pages.end) if page not in wrong)
    if run.data is None:
        return [PageRun(part, None) for part in parts]
    view, first = memoryview(run.data), run.pages.offset_bytes
    return [PageRun(part, view[part.offset_bytes - first :][: part.length_bytes]) for part in parts]


def _split_zeros(run: PageRun, digests: bytes) -> Iterator[tuple[PageRange, bytes | memoryview | None]]:
    """An accepted `run` as parts that are all zero (None) and parts that are not: zero pages stay holes of the file.

    `digests`: 16 bytes a page, as the pages were verified against; they tell without a look at the bytes.
    """
    if run.data is None or ZERO_PAGE_DIGEST not in digests:
        yield run.pages, run.data
        return
    view = memoryview(run.data)
    zeros = [digests[at : at + DIGEST_BYTES] == ZERO_PAGE_DIGEST for at in range(0, len(digests), DIGEST_BYTES)]
    start, zero = 0, zeros[0]
    for index in range(1, run.pages.count + 1):
        last = index == run.pages.count
        now = zero if last else zeros[index]
        if last or now != zero:
            part = PageRange(run.pages.start + start, index - start)
            yield part, None if zero else view[start * PAGE_SIZE : index * PAGE_SIZE]
            start, zero = index, now
