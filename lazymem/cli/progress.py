"""Progress of a command on a terminal; on anything else nothing but its result is printed. rich is imported late."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Reporter:
    """Says nothing. The base of what commands report to: one phase after the other, each with bytes or without."""

    def phase(self, text: str, total_bytes: int | None = None) -> None:
        """A new phase begins; the one before is over."""

    def advance(self, count_bytes: int) -> None:
        """So many bytes of the phase are done."""

    def note(self, text: str) -> None:
        """A line that stays."""


class PlainReporter(Reporter):
    """Phases and notes as lines on stdout, for logs; no bars."""

    def phase(self, text: str, total_bytes: int | None = None) -> None:
        print(f"  {text} ...", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)


class TerminalReporter(Reporter):
    """A line with a bar for the phase that is on, over a running rich display."""

    def __init__(self, display: Progress) -> None:
        self._display = display
        self._task: TaskID | None = None

    def phase(self, text: str, total_bytes: int | None = None) -> None:
        if self._task is not None:
            self._display.remove_task(self._task)
        self._task = self._display.add_task(text, total=total_bytes)

    def advance(self, count_bytes: int) -> None:
        if self._task is not None:
            self._display.advance(self._task, count_bytes)

    def note(self, text: str) -> None:
        self._display.console.print(text, highlight=False)


@contextmanager
def reporting(quiet: bool = False, otherwise: type[Reporter] = Reporter) -> Iterator[Reporter]:
    """A reporter that fits: a display on stderr when that is a terminal, else one of class `otherwise`."""
    if quiet or not sys.stderr.isatty():
        yield Reporter() if quiet else otherwise()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        yield TerminalReporter(display)
