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

    def next_missing(self, pages: PageRange, limit: int) -> PageRange | None:
        """First run of `pages` that are neither held nor written, cut to at most `limit` pages. None: they have none.

        Accepted pages that are not kept yet may count as missing; the scheduler knows those itself. Synchronous, no
        disk; called for each guess behind a fault, so it looks at no byte beyond `pages`.
        """
        ...

    def maybe_digests(self, pages: PageRange) -> bytes | None:
        """16 bytes a page, what a fetch of `pages` must bring, where that is known (a hashed snapshot, their leaf is
        here) and they lie in one leaf. Synchronous, and perhaps a read of 4 KiB."""
        ...

    def maybe_read_held_nowait(self, pages: PageRange) -> bytes | None:
        """Verified bytes of `pages` if all of them are held, by whatever process, and at hand."""
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

    def given(self, pages: PageRange) -> None:
        """The guest's kernel has got `pages`."""
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

    def start(
        self,
        pages: PageRange,
        here: Callable[[bytes | memoryview], None],
        entered: Callable[[], Callable[[list[PageRun] | LazymemError], None]],
    ) -> bool:
        """As `demand`, without a task: whether it was begun. False: nothing was; `demand` is the way (some are on their
        way already, say). Else one of the two is called, once: `here`, later, with the pages' bytes, while nothing else
        has happened since this call; or `entered`, in this call or later, as soon as something else may happen. What
        that returns is then called once, later, with what `demand` would return or raise."""
        ...

    async def demand(self, pages: PageRange) -> list[PageRun]:
        """Return verified runs that cover `pages` exactly, in order; one fetch a page at a time, whoever asks.

        Waits without limit for a lost server unless a deadline was set.

        Raises:
            DeadlineError: the user's deadline passed.
            VerificationError: the source gave wrong bytes, and is not asked again.
        """
        ...
