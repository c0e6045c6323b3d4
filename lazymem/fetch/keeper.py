"""Pages that readers have already, on their way into the sink: one task, whatever has gathered in one go.

The backlog is bounded by whoever fills it: the scheduler asks for nothing more while `Budget.max_unkept_pages` wait.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import trio

from lazymem.errors import LazymemError
from lazymem.fetch.guesses import Asked
from lazymem.fetch.inflight import Want
from lazymem.fetch.sink import Sink
from lazymem.pages import Fetched, PageRun

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.01
PLENTY_PAGES = 256
"""The writes of so long a time, or so many pages, share one trip to a thread: each trip costs as much processor time as
a fault, and takes it from the next one. What waits answers readers from memory meanwhile."""

MAX_GATHER_SECONDS = 0.25
FAULTS_A_PAGE = 8
"""While a guest faults, to keep what it got can wait: until it pauses for `GATHER_SECONDS`, so long at most, and until
so many times as many pages as of guesses have gathered (8 MiB)."""

MAX_BATCH_PAGES = 1024
"""4 MiB a write to the disk: large enough for any of them, and memory is given back in steps."""


OnKept = Callable[[Sequence[Want], Asked | None, LazymemError | None], None]


class Keeper:
    """`run` keeps what was `put`; `on_kept` is called for each, in order, with the wants, who asked for them, and why
    they could not be kept."""

    def __init__(self, sink: Sink, on_kept: OnKept) -> None:
        self._sink = sink
        self._on_kept = on_kept
        self._backlog: deque[tuple[Sequence[Want], Asked | None, Fetched]] = deque()
        self._backlog_pages = 0
        self._guessed_pages = 0  # of the backlog
        self._puts = 0
        self._something = trio.Event()
        self._plenty = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self._over = False

    def put(
        self, wants: Sequence[Want], fetched: Fetched, maybe_asked: Asked | None = None, *, demanded: bool = False
    ) -> None:
        """`fetched` brought `wants`; `demanded`: a reader waited for all of it, and has it."""
        self._backlog.append((wants, maybe_asked, fetched))
        pages = _pages_of(fetched)
        self._backlog_pages += pages
        self._puts += 1
        if not demanded:
            self._guessed_pages += pages
        if not self._something.is_set():
            self._something.set()
        if self._is_plenty():
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
            await self._gather()
            await self._keep(self._next_batch())
            if not self._is_plenty():
                self._plenty = trio.Event()
            if not self._backlog:
                self._something = trio.Event()
                self._idle.set()

    def _is_plenty(self) -> bool:
        return self._guessed_pages >= PLENTY_PAGES or self._backlog_pages >= PLENTY_PAGES * FAULTS_A_PAGE

    async def _gather(self) -> None:
        """Until there is plenty, or a pause, or enough was waited."""
        with trio.move_on_after(MAX_GATHER_SECONDS):
            while not self._plenty.is_set():
                puts = self._puts
                with trio.move_on_after(GATHER_SECONDS):
                    await self._plenty.wait()
                if self._puts == puts or self._guessed_pages:
                    return

    def _next_batch(self) -> list[tuple[Sequence[Want], Asked | None, Fetched]]:
        batch: list[tuple[Sequence[Want], Asked | None, Fetched]] = []
        pages = 0
        while self._backlog and (not batch or pages < MAX_BATCH_PAGES):
            entry = self._backlog.popleft()
            pages += _pages_of(entry[2])
            batch.append(entry)
        self._backlog_pages -= pages
        self._guessed_pages = max(0, self._guessed_pages - pages)  # which of them were guesses matters little
        return batch

    async def _keep(self, batch: list[tuple[Sequence[Want], Asked | None, Fetched]]) -> None:
        """An error is the disk's; the pages are then missing again, and it is for `on_kept` to say so."""
        maybe_error: LazymemError | None = None
        try:
            await self._sink.keep(joined([fetched for _, _, fetched in batch]))
        except LazymemError as error:
            maybe_error = error
        for wants, maybe_asked, _ in batch:
            self._on_kept(wants, maybe_asked, maybe_error)


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
