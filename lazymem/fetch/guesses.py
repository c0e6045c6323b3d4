"""Which guesses to send next: what somebody asked `prefetch` for first, then the strategy's own. Synchronous.

Guesses enter the in-flight table here, in the moment in which they are sent; what is on its way already is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import trio

from lazymem.fetch.inflight import InFlightTable, Want
from lazymem.fetch.prefetch import Prefetcher
from lazymem.fetch.sink import Sink
from lazymem.pages import PageRange

MAX_GUESS_RANGES = 64
"""Of one request, about: 768 bytes of it, and where so many holes are between missing pages, little is missing. What
is over the server's limits the client sends as two."""

MAX_LOOKED_AT_PAGES = 256
"""Of which a store may want none: a millisecond."""


class Asked:
    """One call of `prefetch`: what is left to send, and how many of its requests are out."""

    def __init__(self, ranges: Sequence[PageRange]) -> None:
        self.left = deque(ranges)
        self.flights = 0
        self.settled = trio.Event()

    def check(self) -> None:
        if not self.left and not self.flights:
            self.settled.set()


class GuessQueue:
    """Asked-for ranges, in order, before the guesses of `maybe_prefetcher`."""

    def __init__(
        self,
        table: InFlightTable,
        sink: Sink,
        maybe_prefetcher: Prefetcher | None,
        maybe_not_theirs: Callable[[PageRange], list[PageRange]] | None = None,
    ) -> None:
        """`maybe_not_theirs`: the parts of pages that another process does not bring."""
        self._not_theirs = maybe_not_theirs or _as_it_is
        self.maybe_prefetcher = maybe_prefetcher
        self._table = table
        self._sink = sink
        self._asked: deque[Asked] = deque()
        self._set_aside: Prefetcher | None = None
        self.looked_enough = False
        """The last `take` ended because it had looked at so many pages that others should get a turn."""

    def __bool__(self) -> bool:
        """Whether there may be something to guess."""
        return bool(self._asked) or self.maybe_prefetcher is not None

    def ask(self, ranges: Sequence[PageRange]) -> Asked:
        asked = Asked(ranges)
        self._asked.append(asked)
        return asked

    def pause(self) -> None:
        """No more guesses until `resume`; calls of `prefetch` end when their open requests do."""
        if self.maybe_prefetcher is not None:
            self._set_aside, self.maybe_prefetcher = self.maybe_prefetcher, None
        for asked in self._asked:
            asked.left.clear()
            asked.check()
        self._asked.clear()

    def resume(self) -> None:
        """What was guessed before the pause is guessed again, if it is still missing."""
        if self._set_aside is not None:
            self.maybe_prefetcher, self._set_aside = self._set_aside, None
            self.maybe_prefetcher.brought(PageRange(0, 1))  # of what does not matter: a sweep is worth it again

    def take(self, pages: int) -> tuple[list[Want], Asked | None]:
        """Wants of at most `pages` pages for one request, ascending. Empty: nothing to guess now."""
        while self._asked:
            asked = self._asked[0]
            wants = self._gather(pages, lambda limit, left=asked.left: self._next_left(left, limit))  # type: ignore[misc]
            if wants:
                asked.flights += 1
                return wants, asked
            if self.looked_enough:  # not to its end
                return [], None
            self._asked.popleft()
            asked.check()
        if self.maybe_prefetcher is not None:
            return self._gather(pages, self.maybe_prefetcher.next_range), None
        return [], None

    def _gather(self, pages: int, next_range: Callable[[int], PageRange | None]) -> list[Want]:
        wants: list[Want] = []
        room = pages
        looked_at = 0
        self.looked_enough = False
        while room > 0 and len(wants) < MAX_GUESS_RANGES:
            if looked_at > MAX_LOOKED_AT_PAGES:
                self.looked_enough = True
                break
            guess = next_range(room)
            if guess is None:
                break
            looked_at += guess.count
            for piece in self._worth_fetching(guess):  # all of them: a strategy does not name them again
                wants.append(self._table.add_background(piece))
                room -= piece.count
        wants.sort(key=lambda want: want.pages.start)
        return wants

    def _worth_fetching(self, guess: PageRange) -> list[PageRange]:
        return [
            part
            for piece in self._table.free(guess)
            for ours in self._not_theirs(piece)
            for part in self._sink.worth_fetching(ours)
        ]

    def _next_left(self, left: deque[PageRange], limit: int) -> PageRange | None:
        """The next missing run of what is left, taken out of it."""
        while left:
            pages = left.popleft()
            found = self._sink.next_missing(pages, limit)
            if found is None:
                continue
            if found.end < pages.end:
                left.appendleft(PageRange(found.end, pages.end - found.end))
            return found
        return None


def _as_it_is(pages: PageRange) -> list[PageRange]:
    return [pages]
