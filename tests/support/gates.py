"""A page demand that a test lets go on step by step."""

from __future__ import annotations

import enum
from collections.abc import Callable

import trio
import trio.testing

from lazymem.errors import LazymemError
from lazymem.pages import PageRange, PageRun
from lazymem.store.source import PageSink, PageSource
from tests.support.stores import OpenStore


class Step(enum.Enum):
    """Where a demand waits until the test opens the gate, for all demands from then on."""

    FETCH = "fetch"
    ACCEPT = "accept"
    KEEP = "keep"
    RETURN = "return"


class SteppedDemand:
    """Implements `source.PageDemand`."""

    def __init__(self, source: PageSource, sink: PageSink, nursery: trio.Nursery | None = None) -> None:
        """With a `nursery`, demands may also be started without a task."""
        self._nursery = nursery
        self._source = source
        self._sink = sink
        self.gates = {step: trio.Event() for step in Step}
        self.asked: list[PageRange] = []
        self.waiting = 0

    def start(
        self,
        pages: PageRange,
        here: Callable[[bytes | memoryview], None],
        entered: Callable[[], Callable[[list[PageRun] | LazymemError], None]],
    ) -> bool:
        if self._nursery is None:
            return False
        answered = entered()

        async def bring() -> None:
            try:
                answer: list[PageRun] | LazymemError = await self.demand(pages)
            except LazymemError as error:
                answer = error
            answered(answer)

        self._nursery.start_soon(bring)
        return True

    async def demand(self, pages: PageRange) -> list[PageRun]:
        self.asked.append(pages)
        await self._pass(Step.FETCH)
        fetched = await self._source.fetch([pages], want_leaves=self._sink.missing_leaves(pages))
        await self._pass(Step.ACCEPT)
        self._sink.accept(fetched)
        await self._pass(Step.KEEP)
        await self._sink.keep(fetched)
        await self._pass(Step.RETURN)
        return list(fetched.runs)

    async def _pass(self, step: Step) -> None:
        self.waiting += 1
        try:
            await self.gates[step].wait()
        finally:
            self.waiting -= 1

    def open(self, *steps: Step) -> None:
        for step in steps:
            self.gates[step].set()

    def open_all(self) -> None:
        self.open(*Step)


async def settle(store: OpenStore) -> None:
    """Return when every task waits for the test, and no thread is at work on the store's files."""
    while True:
        await trio.testing.wait_all_tasks_blocked()
        if _threads(store):
            await trio.sleep(0.0002)  # a loop without a pause would keep the interpreter's lock from the thread
            continue
        # A thread that ended has woken its task, which may not have run yet, and may start another thread.
        await trio.testing.wait_all_tasks_blocked()
        if not _threads(store):
            return


def _threads(store: OpenStore) -> int:
    others = trio.to_thread.current_default_thread_limiter().borrowed_tokens
    return others + store.cache.pages.busy + (store.state.ram.busy if store.state else 0)
