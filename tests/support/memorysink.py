"""A page sink in memory for the fetch room's tests: knows the right bytes, and can be slow or full."""

from __future__ import annotations

import trio

from lazymem.errors import LazymemError, VerificationError
from lazymem.pages import Fetched, PageRange


class MemorySink:
    """Fits `store.source.PageSink`. `ram`: what pages must be."""

    def __init__(self, ram: bytes) -> None:
        self.ram = ram
        self.held: set[int] = set()
        self.kept: list[Fetched] = []
        self.accepted_pages = 0
        self.open = trio.Event()
        """`keep` waits for it; set at first."""
        self.open.set()
        self.maybe_error: LazymemError | None = None
        self.leaves_wanted = False

    def missing_leaves(self, pages: PageRange) -> bool:
        return self.leaves_wanted

    def maybe_digests(self, pages: PageRange) -> bytes | None:
        return None

    def given(self, pages: PageRange) -> None:
        pass

    def next_missing(self, pages: PageRange, limit: int) -> PageRange | None:
        first = next((page for page in range(pages.start, pages.end) if page not in self.held), None)
        if first is None:
            return None
        end = first + 1
        while end < min(first + limit, pages.end) and end not in self.held:
            end += 1
        return PageRange(first, end - first)

    def worth_fetching(self, pages: PageRange) -> list[PageRange]:
        return [pages]

    def maybe_read_held_nowait(self, pages: PageRange) -> bytes | None:
        if not self.held.issuperset(range(pages.start, pages.end)):
            return None
        return self.ram[pages.offset_bytes : pages.offset_bytes + pages.length_bytes]

    has_copies = False

    async def copy_equal(self) -> None:
        raise AssertionError("it has none")

    def accept(self, fetched: Fetched) -> None:
        for run in fetched.runs:
            data = bytes(run.pages.length_bytes) if run.data is None else bytes(run.data)
            if data != self.ram[run.pages.offset_bytes : run.pages.offset_bytes + run.pages.length_bytes]:
                raise VerificationError(f"page {run.pages.start} or behind is wrong")
            self.accepted_pages += run.pages.count

    async def keep(self, fetched: Fetched) -> None:
        await self.open.wait()
        if self.maybe_error is not None:
            raise self.maybe_error
        self.kept.append(fetched)
        for run in fetched.runs:
            pages = set(range(run.pages.start, run.pages.end))
            assert not pages & self.held, "kept twice"
            self.held |= pages
