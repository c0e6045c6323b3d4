"""How the scheduler starts a fetch without waiting for it: the client does it itself, any other source by a task."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import trio

from lazymem.errors import LazymemError
from lazymem.fetch.backoff import Backoff
from lazymem.pages import PAGE_SHIFT, Fetched, PageRange

logger = logging.getLogger(__name__)

OnFetched = Callable[[Fetched | LazymemError], None]
OnEarly = Callable[[Fetched], object]
OnHere = Callable[[bytes | None], None]

BACKOFF_BASE_SECONDS = 0.05
BACKOFF_CAP_SECONDS = 5.0


class Source(Protocol):
    """The store's `PageSource`, by its shape."""

    @property
    def total_pages(self) -> int: ...

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched: ...


class Handle(Protocol):
    """A fetch that was started."""

    def cancel(self) -> None:
        """`on_done` is not called any more."""
        ...

    def promote(self, pages: PageRange, on_early: OnEarly) -> None:
        """A reader waits for `pages` of it now, be it a guess or what several readers wait for. Parts of the answer
        that have some of them are given to `on_early` as they come, those that are here already at once; `on_done` gets
        them again, with the rest."""
        ...


@runtime_checkable
class FetchStarter(Protocol):
    """What the scheduler needs of a source. `on_done` is called once, in trio's thread; from `start_fetch` itself only
    with an error."""

    def start_fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool, background: bool, on_done: OnFetched
    ) -> Handle: ...

    def start_lone(self, pages: PageRange, want_leaves: bool, on_here: OnHere, on_done: OnFetched) -> None:
        """As `start_fetch`, for one demanded range that is never cancelled. Where its answer is one frame as it is,
        `on_here` gets the bytes (None: zeros) instead of `on_done`; not from `start_lone` itself."""
        ...

    def ask(self, pages: PageRange) -> bool:
        """Send for `pages`, whose leaf is here, and note nothing: whoever calls lets nothing else happen here until
        `end_asked` or `enter_asked`. False: nothing was sent."""
        ...

    def maybe_asked_answer(self) -> bytes | memoryview | None:
        """The bytes of what was asked, if they came in one frame as they are, and nothing else; None: call
        `enter_asked`, then `receive_nowait`, which acts on what came."""
        ...

    def end_asked(self) -> None:
        """What `maybe_asked_answer` gave was right."""
        ...

    def enter_asked(self, on_here: OnHere, on_done: OnFetched) -> None:
        """From now on what was asked is as if begun by `start_lone`."""
        ...

    def fileno(self) -> int:
        """Readable when answers to demands came; -1: there is nothing to look at."""
        ...

    def receive_nowait(self) -> bool:
        """Act on what came, between awaits of any task; whether there was something."""
        ...

    def doubt(self, why: str) -> None:
        """It gives wrong bytes again and again: where there is another server, that is asked from now on."""
        ...

    @property
    def best_round_trip_seconds(self) -> float: ...

    @property
    def wire_received_bytes(self) -> int: ...


class _TaskHandle:
    def __init__(self, scope: trio.CancelScope) -> None:
        self._scope = scope

    def cancel(self) -> None:
        self._scope.cancel()

    def promote(self, pages: PageRange, on_early: OnEarly) -> None:
        """Its answer comes as a whole."""


class TaskStarter:
    """A task a fetch, for sources that can only be awaited. Temporary errors are tried again for ever (rule 7)."""

    best_round_trip_seconds = math.inf

    def __init__(self, source: Source, nursery: trio.Nursery) -> None:
        self._source = source
        self._nursery = nursery
        self._rng = random.Random()
        self.wire_received_bytes = 0

    def start_fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool, background: bool, on_done: OnFetched
    ) -> Handle:
        scope = trio.CancelScope()

        async def fetch() -> None:
            with scope:
                answer = await self._fetch(ranges, want_leaves, background)
                if not scope.cancel_called:
                    on_done(answer)

        self._nursery.start_soon(fetch)
        return _TaskHandle(scope)

    def start_lone(self, pages: PageRange, want_leaves: bool, on_here: OnHere, on_done: OnFetched) -> None:
        self.start_fetch((pages,), want_leaves=want_leaves, background=False, on_done=on_done)

    def ask(self, pages: PageRange) -> bool:
        """Never: it takes a task."""
        return False

    def maybe_asked_answer(self) -> bytes | memoryview | None:
        raise AssertionError("nothing was asked")

    def end_asked(self) -> None:
        raise AssertionError("nothing was asked")

    def enter_asked(self, on_here: OnHere, on_done: OnFetched) -> None:
        raise AssertionError("nothing was asked")

    def fileno(self) -> int:
        """Its fetches need their tasks to run."""
        return -1

    def receive_nowait(self) -> bool:
        return False

    def doubt(self, why: str) -> None:
        """There is only the one."""

    async def _fetch(self, ranges: Sequence[PageRange], want_leaves: bool, background: bool) -> Fetched | LazymemError:
        backoff = Backoff(BACKOFF_BASE_SECONDS, BACKOFF_CAP_SECONDS, self._rng)
        while True:
            asked_at = trio.current_time()
            try:
                fetched = await self._source.fetch(ranges, want_leaves=want_leaves, background=background)
            except LazymemError as error:
                if not error.temporary:
                    return error
                logger.warning("fetch of page %d failed and is tried again: %s", ranges[0].start, error)
                await trio.sleep(backoff.next_delay())
                continue
            self.best_round_trip_seconds = min(self.best_round_trip_seconds, trio.current_time() - asked_at)
            self.wire_received_bytes += sum(run.pages.count for run in fetched.runs if run.data) << PAGE_SHIFT
            return fetched


def starter_of(source: Source, nursery: trio.Nursery) -> FetchStarter:
    """The source itself if it can start fetches, else tasks around it."""
    return source if isinstance(source, FetchStarter) else TaskStarter(source, nursery)
