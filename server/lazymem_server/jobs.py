"""One open request and what is still to be answered. A job makes its answer a step at a time, as the client takes it.

A step is tried without waiting for a disk first (`step_nowait`); only if that fails does it go to a thread (`step`). A
job is in one place at a time, so neither needs a lock. Knows no sockets and no clock.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES
from lazymem.errors import VerificationError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.snapshot.reader import SmallFile, SnapshotReader, VouchedRun
from lazymem.wire.messages import (
    Capability,
    Digests,
    Encoding,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    FetchFlag,
    FileData,
    Level,
    Packed,
    Pages,
    PublishedFile,
    ReadFile,
)
from lazymem.wire.pagedata import compress_pages
from lazymem_server.limits import ServerLimits
from lazymem_server.pace import Pace

Answer = Pages | Packed | Digests | FileData | Error

COMPRESSED_STEP_PAGES = 64

SMALL_PAGES = 8
"""Runs of fewer pages are sent as they are unless the link is slow: there is little to find in them."""

UPPER_STEP = 4096
"""Leaf digests of one frame: 64 KiB, as guessed pages have it."""


class Job(Protocol):
    id: int
    background: bool
    done: bool
    """The last answer was made."""
    data_bytes: int
    """Of pages that are not zero, made by the last step; `wire_bytes`: what it made of them."""
    wire_bytes: int

    @property
    def is_short(self) -> bool:
        """One frame answers all that is left of it."""
        ...

    def step_nowait(self) -> list[Answer] | None:
        """The next answers, or None if a disk has to be waited for."""
        ...

    def step(self) -> list[Answer]:
        """The next answers; may wait for a disk."""
        ...


class FetchJob:
    """Answers a FETCH: leaves when asked for, then the pages below them, in ascending order."""

    def __init__(
        self,
        request: Fetch,
        reader: SnapshotReader,
        capabilities: Capability,
        limits: ServerLimits,
        pace: Pace,
        *,
        suspect: bool = False,
    ) -> None:
        """Args:
        suspect: the client had one of the pages a moment ago and asks again: look at the bytes, whatever `stat` says.
        """
        self.id = request.id
        self.background = bool(request.flags & FetchFlag.BACKGROUND)
        self.done = False
        self.data_bytes = self.wire_bytes = 0
        self._reader = reader
        self._may_compress = bool(capabilities & Capability.ZSTD)
        self._pace = pace
        self._suspect = suspect
        self._ranges = deque(request.ranges)
        self._wants_leaves = reader.hashed and bool(request.flags & FetchFlag.WANT_DIGESTS)
        self._leaf_sent = -1
        self._packs = reader.hashed and bool(request.flags & FetchFlag.PACKED)
        self._in_zeros = False  # the last step met nothing else
        self._demand_frame_pages = limits.demand_frame_pages
        self._cold_pages = limits.cold_read_pages if self.background else limits.demand_frame_pages

    @property
    def is_short(self) -> bool:
        return len(self._ranges) == 1 and self._ranges[0].count <= self._frame_pages()

    def step_nowait(self) -> list[Answer] | None:
        if self._packs and not self._in_zeros:
            return self._several_nowait()
        pages = self._next(LEAF_PAGES if self._in_zeros else self._step_pages())
        if self._in_zeros and not self._reader.hashed and pages.count > 1:
            return None  # perhaps a hole: the other step asks the file system, and then answers a MiB at once
        leaf = self._missing_leaf(pages)
        if leaf is not None and self._reader.leaf_nowait(leaf) is None:
            return None
        runs = self._reader.read_nowait(pages, suspect=self._suspect)
        return None if runs is None else self._answers(leaf, runs)

    def _several_nowait(self) -> list[Answer] | None:
        """As `step_nowait`, of as many ranges as a frame has room for."""
        ranges = self._next_several(self._step_pages())
        leaf = self._missing_leaf(ranges[0])
        if leaf is not None and self._reader.leaf_nowait(leaf) is None:
            return None
        runs: list[VouchedRun] = []
        for pages in ranges:
            found = self._reader.read_nowait(pages, suspect=self._suspect)
            if found is None:
                break
            runs += found
        return self._answers(leaf, runs) if runs else None

    def _next_several(self, most: int) -> list[PageRange]:
        """What comes next: at most so many pages, of one leaf."""
        found = [self._next(most)]
        most -= found[0].count
        leaf = found[0].start // LEAF_PAGES
        for pages in itertools.islice(self._ranges, 1, None):
            if not most or pages.start // LEAF_PAGES != leaf or found[-1].end % LEAF_PAGES == 0:
                break
            found.append(PageRange(pages.start, min(pages.count, most, LEAF_PAGES - pages.start % LEAF_PAGES)))
            most -= found[-1].count
        return found

    def _step_pages(self) -> int:
        """As much as a demand that comes meanwhile may wait for: 0.3 ms of copying, 1 ms of compressing."""
        return min(self._frame_pages(), COMPRESSED_STEP_PAGES) if self._pace.level else self._frame_pages()

    def _frame_pages(self) -> int:
        pages = self._pace.frame_pages
        return pages if self.background else min(pages, self._demand_frame_pages)

    def step(self) -> list[Answer]:
        pages = self._next(LEAF_PAGES)
        return self._answers(self._missing_leaf(pages), self._reader.read_some(pages, self._cold_pages))

    def _next(self, most: int) -> PageRange:
        """What comes next: at most so many pages, and inside one leaf."""
        here = self._ranges[0]
        return PageRange(here.start, min(here.count, most, LEAF_PAGES - here.start % LEAF_PAGES))

    def _missing_leaf(self, pages: PageRange) -> int | None:
        leaf = pages.start // LEAF_PAGES
        return leaf if self._wants_leaves and leaf != self._leaf_sent else None

    def _answers(self, leaf: int | None, runs: Sequence[VouchedRun]) -> list[Answer]:
        found: list[Answer] = []
        if leaf is not None:
            found.append(Digests(self.id, Level.LEAF, leaf, self._reader.leaf(leaf)))
            self._leaf_sent = leaf
        self._advance(runs[-1].pages.end)
        self._in_zeros = all(run.data is None for run in runs)
        self.data_bytes = sum(len(run.data) for run in runs if run.data is not None)
        self.wire_bytes = 0
        if self._packs and not any(run.data is None for run in runs):
            return [*found, self._packed(runs)]
        frame_pages = self._frame_pages()
        for run in runs:
            last_run = run is runs[-1]
            for pages in run.pages.pieces(LEAF_PAGES if run.data is None else frame_pages):
                final = self.done and last_run and pages.end == run.pages.end
                found.append(self._frame(run, pages, final))
        return found

    def _level(self, count: int) -> int:
        """A demand waits for zstd as long as for a 1 Gb/s link: only over a slow one it pays."""
        fast = (count < SMALL_PAGES or not self.background) and not self._pace.slow
        return 0 if fast or not self._may_compress else self._pace.level

    def _advance(self, page: int) -> None:
        """Everything before `page` is answered."""
        while self._ranges and self._ranges[0].start < page:
            here = self._ranges.popleft()
            if page < here.end:
                self._ranges.appendleft(PageRange(page, here.end - page))
        self.done = not self._ranges

    def _packed(self, runs: Sequence[VouchedRun]) -> Packed:
        """One frame of all `runs`, which have data and are no more than a leaf."""
        parts = [run.data for run in runs if run.data is not None]
        count = sum(run.pages.count for run in runs)
        encoding, data = compress_pages(parts[0] if len(parts) == 1 else b"".join(parts), self._level(count))
        self.wire_bytes = len(data)
        return Packed(self.id, runs[0].pages.start, count, encoding, data, self.done)

    def _frame(self, run: VouchedRun, pages: PageRange, final: bool) -> Pages:
        if run.data is None:
            return Pages(self.id, pages, Encoding.ZERO, final=final)
        first, end = pages.start - run.pages.start, pages.end - run.pages.start
        encoding, data = compress_pages(run.data[first * PAGE_SIZE : end * PAGE_SIZE], self._level(pages.count))
        self.wire_bytes += len(data)
        digests = b"" if self._reader.hashed else run.digests[first * DIGEST_BYTES : end * DIGEST_BYTES]
        return Pages(self.id, pages, encoding, data, digests, final)


class DigestsJob:
    """Answers a FETCH_DIGESTS. What is vouched for is a guess, as a whole leaf of pages is read for it."""

    is_short = False
    data_bytes = wire_bytes = 0

    def __init__(self, request: FetchDigests, reader: SnapshotReader) -> None:
        self.id = request.id
        self.background = not reader.hashed
        self.done = False
        self._reader = reader
        self._level = request.level
        self._next = request.first
        self._end = request.first + request.count

    def step_nowait(self) -> list[Answer] | None:
        if self._level == Level.LEAF and self._reader.leaf_nowait(self._next) is None:
            return None
        return self.step()

    def step(self) -> list[Answer]:
        first = self._next
        if self._level == Level.LEAF:
            data, self._next = self._reader.leaf(first), first + 1
        else:
            self._next = min(self._end, first + UPPER_STEP)
            data = self._reader.upper(first, self._next - first)
        self.done = self._next == self._end
        return [Digests(self.id, self._level, first, data, self.done)]


class ReadFileJob:
    """Answers a READ_FILE of a file that is there."""

    background = False
    is_short = False
    data_bytes = wire_bytes = 0

    def __init__(self, request: ReadFile, file: SmallFile | bytes) -> None:
        self.id = request.id
        self.done = False
        self._request = request
        self._file = file

    def step_nowait(self) -> list[Answer] | None:
        return self.step() if isinstance(self._file, bytes) else None

    def step(self) -> list[Answer]:
        offset, length = self._request.offset, self._request.length
        file = self._file
        data = file[offset : offset + length] if isinstance(file, bytes) else file.read(offset, length)
        self.done = True
        return [FileData(self.id, data)]


def make_job(
    request: Fetch | FetchDigests | ReadFile,
    reader: SnapshotReader,
    capabilities: Capability,
    limits: ServerLimits,
    pace: Pace,
    working_set: SmallFile | bytes,
    *,
    suspect: bool = False,
) -> Job | Error:
    """The job of a request that the protocol allows; an `Error` if there is nothing to answer it with.

    `working_set`: the snapshot's own, or a learned one's bytes.
    """
    if isinstance(request, Fetch):
        return FetchJob(request, reader, capabilities, limits, pace, suspect=suspect)
    if isinstance(request, FetchDigests):
        return DigestsJob(request, reader)
    if request.file == PublishedFile.MANIFEST:
        file: SmallFile | bytes = reader.manifest_bytes
    elif request.file == PublishedFile.WORKING_SET:
        file = working_set
    else:
        file = reader.vmstate if request.file == PublishedFile.VMSTATE else reader.sums
    if not (len(file) if isinstance(file, bytes) else file.size_bytes):
        return Error(request.id, ErrorCode.NO_SUCH_FILE, f"the snapshot has no {request.file.name.lower()}")
    return ReadFileJob(request, file)


def failure(job: Job, error: VerificationError | OSError) -> Error:
    """The answer that ends `job` when a step raised. Paths of this host stay here."""
    job.done = True
    if isinstance(error, VerificationError):
        return Error(job.id, ErrorCode.PAGE_CHANGED, str(error))
    return Error(job.id, ErrorCode.IO_ERROR, f"the server cannot read the snapshot: {error.strerror}")


MOST_SHORT_IN_A_ROW = 8
"""Then a longer demand gets a frame in: nobody is to wait for ever for others' faults."""


class JobQueue:
    """Jobs that can go on, demands before guesses.

    Demands of one frame go before longer ones, of which one after the other is answered, since nobody has use for half
    of one; guesses get a step each in turn.
    """

    def __init__(self) -> None:
        self._short: deque[Job] = deque()
        self._short_in_a_row = 0
        self._demand: deque[Job] = deque()
        self._background: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._short) + len(self._demand) + len(self._background)

    @property
    def has_short(self) -> bool:
        """Whether one frame answers some demand."""
        return bool(self._short)

    @property
    def has_long(self) -> bool:
        """Whether some demand needs several."""
        return bool(self._demand)

    @property
    def has_background(self) -> bool:
        return bool(self._background)

    def put(self, job: Job) -> None:
        """Behind its equals."""
        (self._background if job.background else self._short if job.is_short else self._demand).append(job)

    def put_back(self, job: Job) -> None:
        """After a step of it, and before the next."""
        if job.background:
            self._background.append(job)
        else:
            (self._short if job.is_short else self._demand).appendleft(job)

    def maybe_next(self, *, short: bool, long: bool, background: bool) -> Job | None:
        """Take the next job of a kind that is allowed: demands of one frame, of several, guesses."""
        longs_turn = long and self._demand and self._short_in_a_row >= MOST_SHORT_IN_A_ROW
        if short and self._short and not longs_turn:
            self._short_in_a_row += 1
            return self._short.popleft()
        if long and self._demand:
            self._short_in_a_row = 0
            return self._demand.popleft()
        return self._background.popleft() if background and self._background else None

    def maybe_remove(self, request_id: int) -> Job | None:
        """Take the job of that id if it waits here."""
        for waiting in (self._short, self._demand, self._background):
            for job in _with_id(waiting, request_id):
                waiting.remove(job)
                return job
        return None


def _with_id(jobs: Iterable[Job], request_id: int) -> list[Job]:
    return [job for job in jobs if job.id == request_id]
