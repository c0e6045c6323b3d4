"""Layers over a page source, each doing one thing and passing the rest on: delay, error, count, damage.

For tests and for fault injection by hand; after nbdkit's filters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from lazymem.errors import LazymemError, ServerUnreachableError
from lazymem.pages import Fetched, PageRange
from lazymem.store.source import PageSource


class Layer:
    """Passes everything on; the base of the others."""

    def __init__(self, source: PageSource) -> None:
        self._source = source

    @property
    def total_pages(self) -> int:
        return self._source.total_pages

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched:
        return await self._source.fetch(ranges, want_leaves=want_leaves, background=background)


class DelayLayer(Layer):
    """Each answer comes `seconds` later."""

    def __init__(self, source: PageSource, seconds: float) -> None:
        super().__init__(source)
        self._seconds = seconds

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched:
        await trio.sleep(self._seconds)
        return await super().fetch(ranges, want_leaves=want_leaves, background=background)


def _unreachable() -> LazymemError:
    return ServerUnreachableError("injected: the connection went away")


class ErrorLayer(Layer):
    """Fetches with a number in `failing` (the first is 0) raise what `error` makes, instead of being passed on."""

    def __init__(
        self, source: PageSource, failing: range | frozenset[int], error: Callable[[], LazymemError] = _unreachable
    ) -> None:
        super().__init__(source)
        self._failing = failing
        self._error = error
        self.fetches = 0

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched:
        number = self.fetches
        self.fetches += 1
        if number in self._failing:
            raise self._error()
        return await super().fetch(ranges, want_leaves=want_leaves, background=background)


class CountLayer(Layer):
    """Counts what was asked for."""

    def __init__(self, source: PageSource) -> None:
        super().__init__(source)
        self.fetches = 0
        self.pages = 0
        self.background_fetches = 0

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched:
        self.fetches += 1
        self.background_fetches += background
        self.pages += sum(pages.count for pages in ranges)
        return await super().fetch(ranges, want_leaves=want_leaves, background=background)


class DamageLayer(Layer):
    """Each answer goes through `damage`: a source that lies."""

    def __init__(self, source: PageSource, damage: Callable[[Fetched], Fetched]) -> None:
        super().__init__(source)
        self._damage = damage

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched:
        return self._damage(await super().fetch(ranges, want_leaves=want_leaves, background=background))
