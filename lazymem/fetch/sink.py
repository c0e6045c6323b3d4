"""Where fetched pages go, as the fetch room sees it."""

from __future__ import annotations

from typing import Protocol

from lazymem.pages import Fetched, PageRange


class Sink(Protocol):
    """The store's `PageSink`, by its shape."""

    def missing_leaves(self, pages: PageRange) -> bool: ...
    def next_missing(self, start: int, limit: int) -> PageRange | None: ...
    def accept(self, fetched: Fetched) -> None: ...
    async def keep(self, fetched: Fetched) -> None: ...
