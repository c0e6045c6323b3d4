"""What the store needs from outside: pages, on demand. The scheduler of `fetch/` fits this without an import.

Also the sink into which fetched pages go. The records that travel are `pages.PageRun` and `pages.Fetched`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lazymem.errors import LazymemError
from lazymem.pages import Fetched, PageRange, PageRun


class PageSource(Protocol):
    """Pristine pages of one snapshot, from anywhere: a server, a local folder, a layer over another source."""

    @property
    def total_pages(self) -> int: ...

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched:
        """Bring the pages of `ranges` (ascending, not overlapping).

        Raises:
            LazymemError: classified; a temporary one may be tried again.
        """
        ...


class PageSink(Protocol):
    """Where fetched pages go: verifies them, keeps them, and only then calls them held. Implemented by the store."""

    def missing_leaves(self, pages: PageRange) -> bool:
        """Whether verifying `pages` needs leaf blocks that are not here yet."""
        ...

    def next_missing(self, start: int, limit: int) -> PageRange | None:
        """First run of pages neither held nor written at or behind page `start`, cut to at most `limit` pages.

        Accepted pages that are not kept yet may count as missing; the scheduler knows those itself. None: nothing is
        missing from `start` to the end. Synchronous, no disk; called once a pre-paging request, so O(gap) is fine.
        """
        ...

    def worth_fetching(self, pages: PageRange) -> list[PageRange]:
        """The parts of missing `pages` that a guess should bring; the sink can have the others without the source."""
        ...

    @property
    def has_copies(self) -> bool:
        """Whether `worth_fetching` left something to `copy_equal`."""
        ...

    async def copy_equal(self) -> None:
        """Hold what is equal to held pages. Blocking work in a thread."""
        ...

    def accept(self, fetched: Fetched) -> None:
        """Verify; afterwards `fetched.runs` may be given to readers. Synchronous, no disk.

        Raises:
            VerificationError: naming the page; nothing of `fetched` was kept.
        """
        ...

    async def keep(self, fetched: Fetched) -> None:
        """Write accepted pages to the cache file, then mark them held. Blocking work in a thread."""
        ...


class PageDemand(Protocol):
    """What the store calls when a reader needs pages that are not held."""

    def start(self, pages: PageRange, done: Callable[[list[PageRun] | LazymemError], None]) -> bool:
        """As `demand`, without a task: whether it was begun. `done` is then called once, later, with what `demand`
        would return or raise. False: nothing was begun; `demand` is the way (some are on their way already, say)."""
        ...

    async def demand(self, pages: PageRange) -> list[PageRun]:
        """Return verified runs that cover `pages` exactly, in order; one fetch a page at a time, whoever asks.

        Waits without limit for a lost server unless a deadline was set.

        Raises:
            DeadlineError: the user's deadline passed.
            VerificationError: the source insists on wrong bytes.
        """
        ...
