"""Pages that readers have already, on their way into the sink: one task, whatever has gathered in one go.

The backlog is bounded by whoever fills it: the scheduler asks for nothing more while `Budget.max_unkept_pages` wait.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import trio

from lazymem.errors import LazymemError
from lazymem.pages import Fetched, PageRange, PageRun

logger = logging.getLogger(__name__)

T = TypeVar("T")

GATHER_SECONDS = 0.01
PLENTY_PAGES = 256
"""The writes of so long a time, or so many pages, share one trip to a thread: each trip costs as much processor time as
a fault, and takes it from the next one. What waits answers readers from memory meanwhile."""

MAX_BATCH_PAGES = 1024
"""4 MiB a write to the disk: large enough for any of them, and memory is given back in steps."""


class Sink(Protocol):
    """The store's `PageSink`, by its shape."""

    def missing_leaves(self, pages: PageRange) -> bool: ...
    def next_missing(self, start: int, limit: int) -> PageRange | None: ...
    def accept(self, fetched: Fetched) -> None: ...
    async def keep(self, fetched: Fetched) -> None: ...


class Keeper(Generic[T]):
    """`run` keeps what was `put`; `on_kept(tag, maybe_error)` is called for each, in order."""

    def __init__(self, sink: Sink, on_kept: Callable[[T, LazymemError | None], None]) -> None:
        self._sink = sink
        self._on_kept = on_kept
        self._backlog: deque[tuple[T, Fetched]] = deque()
        self._backlog_pages = 0
        self._something = trio.Event()
        self._plenty = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self._over = False

    def put(self, tag: T, fetched: Fetched) -> None:
        self._backlog.append((tag, fetched))
        self._backlog_pages += _pages_of(fetched)
        self._something.set()
        if self._backlog_pages >= PLENTY_PAGES:
            self._plenty.set()
        if self._idle.is_set() and not self._over:
            self._idle = trio.Event()

    async def wait_idle(self) -> None:
        """Until everything that was put so far, and what came meanwhile, is kept; or `run` is over (fetched pages are
        a cache: what is not kept is missing next time)."""
        await self._idle.wait()

    async def run(self) -> None:
        """Keep what is put, until cancelled."""
        try:
            await self._run()
        finally:
            self._over = True
            self._idle.set()

    async def _run(self) -> None:
        while True:
            await self._something.wait()
            with trio.move_on_after(GATHER_SECONDS):
                await self._plenty.wait()
            await self._keep(self._next_batch())
            if self._backlog_pages < PLENTY_PAGES:
                self._plenty = trio.Event()
            if not self._backlog:
                self._something = trio.Event()
                self._idle.set()

    def _next_batch(self) -> list[tuple[T, Fetched]]:
        batch: list[tuple[T, Fetched]] = []
        pages = 0
        while self._backlog and (not batch or pages < MAX_BATCH_PAGES):
            entry = self._backlog.popleft()
            pages += _pages_of(entry[1])
            batch.append(entry)
        self._backlog_pages -= pages
        return batch

    async def _keep(self, batch: list[tuple[T, Fetched]]) -> None:
        """An error is the disk's; the pages are then missing again, and it is for `on_kept` to say so."""
        maybe_error: LazymemError | None = None
        try:
            await self._sink.keep(joined([fetched for _, fetched in batch]))
        except LazymemError as error:
            maybe_error = error
        for tag, _ in batch:
            self._on_kept(tag, maybe_error)


def _pages_of(fetched: Fetched) -> int:
    return sum([run.pages.count for run in fetched.runs])


def joined(answers: Sequence[Fetched]) -> Fetched:
    """Answers of disjoint pages as one."""
    if len(answers) == 1:
        return answers[0]
    runs: list[PageRun] = []
    leaves: dict[int, bytes] = {}
    page_digests: dict[int, bytes] = {}
    for fetched in answers:
        runs += fetched.runs
        leaves.update(fetched.leaves)
        page_digests.update(fetched.page_digests)
    runs.sort(key=lambda run: run.pages)
    return Fetched(tuple(runs), leaves, page_digests)
