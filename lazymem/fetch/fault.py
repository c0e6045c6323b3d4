"""A page fault's own way through the fetch room: one run of pages that nobody has asked for, one frame out, one in.

It is a want in the in-flight table like any other, so whoever else needs its pages joins it, but its first reader has
no `Demand` and its request no `Flight`: they are made only where the short way ends (a refused answer, several frames).
"""

from __future__ import annotations

from collections.abc import Callable

from lazymem.errors import LazymemError
from lazymem.fetch.inflight import State, Want
from lazymem.pages import PageRange, PageRun

Done = Callable[[list[PageRun] | LazymemError], None]


class Fault(Want):
    """`done` is called once, with the pages or the error. `started_at`: seconds, of `perf_counter`."""

    __slots__ = ("done", "started_at")

    def __init__(self, pages: PageRange, done: Done, started_at: float) -> None:
        self.pages = pages
        self.background = False
        self.state = State.SENT
        self.attempts = 0
        self.demands = []
        self.error = None
        self.runs = ()
        self.done = done
        self.started_at = started_at
