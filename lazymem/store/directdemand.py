"""Demand without a scheduler: each one is fetched by itself. For a source on the same host, and for tests."""

from __future__ import annotations

from collections.abc import Callable

from lazymem.errors import LazymemError
from lazymem.pages import PageRange, PageRun
from lazymem.store.source import PageSink, PageSource


class DirectDemand:
    """Implements `source.PageDemand`; errors of source and sink go to the reader as they are."""

    def __init__(self, source: PageSource, sink: PageSink) -> None:
        self._source = source
        self._sink = sink

    def start(
        self,
        pages: PageRange,
        here: Callable[[bytes | memoryview], None],
        entered: Callable[[], Callable[[list[PageRun] | LazymemError], None]],
    ) -> bool:
        """Never: it takes a task."""
        return False

    async def demand(self, pages: PageRange) -> list[PageRun]:
        """Fetch, verify, keep, return."""
        fetched = await self._source.fetch([pages], want_leaves=self._sink.missing_leaves(pages))
        self._sink.accept(fetched)
        await self._sink.keep(fetched)
        return list(fetched.runs)
