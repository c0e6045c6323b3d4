"""Which candidates to decide next: asks the source for the digests of leaf after leaf, once the guest stands.

A source answers only for a frozen guest, so the first answer says that candidates may be looked at. What a guest
touches goes first: one leaf's digests (4 KiB) tell of 256 pages which are here already. Candidates that turn out to be
wrong were written lately, and are asked for before anything else that is guessed.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from lazymem.digests import LEAF_PAGES
from lazymem.errors import LazymemError, StoreError
from lazymem.fetch.prefetch import Prefetcher
from lazymem.pages import PageRange

logger = logging.getLogger(__name__)

LEAF_SECONDS = 0.002
"""The source reads and hashes a leaf in so long, one after the other: more requests than fit into a round trip only
make a touched leaf wait."""

MAX_ASKED = 16
"""64 KiB of digests on their way, whatever the round trip: a demand's answer waits for no more."""


class LeafSource(Protocol):
    """Of `client.Client`."""

    @property
    def best_round_trip_seconds(self) -> float: ...
    async def leaf_digests(self, leaf: int) -> bytes: ...


class Adopter(Protocol):
    """The store's `Adoption`, by its shape."""

    async def begin(self) -> list[int]: ...
    async def adopt(self, leaf: int, digests: bytes) -> list[PageRange]: ...
    def give_up(self, leaf: int) -> None: ...
    def finish(self) -> None: ...


Bring = Callable[[Sequence[PageRange]], Awaitable[None]]
"""The scheduler's `prefetch`."""


class Adopting:
    """`run` decides every candidate, or gives it up. `on_decided`: what was held back may be guessed now."""

    def __init__(self, source: LeafSource, adopter: Adopter, bring: Bring, on_decided: Callable[[], None]) -> None:
        self._source = source
        self._adopter = adopter
        self._bring = bring
        self._on_decided = on_decided
        self._left: dict[int, None] = {}
        self._touched: deque[int] = deque()
        self._refused: list[PageRange] = []
        self._has_refused = trio.Event()

    def faulted(self, pages: PageRange) -> None:
        """The guest waits for `pages`: what is around them is decided next."""
        for leaf in range(pages.start // LEAF_PAGES, (pages.end - 1) // LEAF_PAGES + 1):
            if leaf in self._left:
                del self._left[leaf]
                self._touched.append(leaf)

    async def run(self) -> None:
        """Until all is decided. Whatever fails, what was held back is asked for in the end."""
        try:
            first = await self._source.leaf_digests(0)
            leaves = await self._adopter.begin()
            self._left = dict.fromkeys(leaves)
            await self._decide(0, first)
            self._on_decided()
            await self._decide_all()
        except LazymemError as error:
            logger.warning("pages that came ahead of the guest are not used: %s", error)
        finally:
            self._adopter.finish()
            self._on_decided()

    async def _decide_all(self) -> None:
        """
        Raises:
            StoreError: the disk refused.
        """
        cause: StoreError | None = None
        async with trio.open_nursery() as bringing:
            bringing.start_soon(self._bring_refused)
            try:
                async with trio.open_nursery() as nursery:
                    for _ in range(self._workers()):
                        nursery.start_soon(self._work)
            except* StoreError as group:
                cause = StoreError(str(group.exceptions[0]))
            bringing.cancel_scope.cancel()  # what it had not asked for yet, the sweep asks for
        if cause is not None:
            raise cause

    def _workers(self) -> int:
        seconds = self._source.best_round_trip_seconds
        return 2 if math.isinf(seconds) else min(MAX_ASKED, 2 + math.ceil(seconds / LEAF_SECONDS))

    async def _work(self) -> None:
        while self._left or self._touched:
            leaf = self._touched.popleft() if self._touched else next(iter(self._left))
            self._left.pop(leaf, None)
            try:
                digests = await self._source.leaf_digests(leaf)
            except LazymemError as error:
                self._give_up(leaf, error)
            else:
                await self._decide(leaf, digests)

    async def _decide(self, leaf: int, digests: bytes) -> None:
        self._left.pop(leaf, None)
        try:
            refused = await self._adopter.adopt(leaf, digests)
        except StoreError:
            raise
        except LazymemError as error:
            self._give_up(leaf, error)
            return
        if refused:
            self._refused += refused
            self._has_refused.set()

    def _give_up(self, leaf: int, error: LazymemError) -> None:
        logger.warning("pages that came ahead of the guest are not used in leaf %d: %s", leaf, error)
        self._adopter.give_up(leaf)

    async def _bring_refused(self) -> None:
        while True:
            await self._has_refused.wait()
            self._has_refused = trio.Event()
            ranges, self._refused = sorted(self._refused), []
            await self._bring(ranges)


class ToldToBoth:
    """A `Prefetcher` whose faults the candidates hear of, too."""

    def __init__(self, inner: Prefetcher, adopting: Adopting) -> None:
        self._inner = inner
        self._adopting = adopting

    def faulted(self, pages: PageRange) -> None:
        self._inner.faulted(pages)
        self._adopting.faulted(pages)

    @property
    def is_near(self) -> bool:
        return self._inner.is_near

    def brought(self, pages: PageRange) -> None:
        self._inner.brought(pages)

    def next_range(self, max_pages: int) -> PageRange | None:
        return self._inner.next_range(max_pages)
