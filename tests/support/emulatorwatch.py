"""Both emulators of a hand-over: whether their guests run, and when they did, by what the emulators tell by themselves.

Who only asks now and then does not see a guest that runs between two questions; STOP and RESUME come with their times.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from lazymem.errors import MonitorError
from lazymem.vm.qmpclient import CommandError, Event, QmpClient

_PATIENT_SECONDS = 10.0
"""For an answer. An emulator that waits for a page may not answer, and what it told meanwhile is read later."""


class Span(Struct):
    """Unix time. The guest ran from `began` on, and at least until `known`."""

    began: float
    known: float
    ended: bool = False


class EmulatorWatch:
    """One emulator's monitor, connected to as long as there is one. A QEMU's serves nobody else meanwhile."""

    def __init__(self, monitor: Path) -> None:
        self._monitor = monitor
        self._maybe_client: QmpClient | None = None
        self._connected_at = 0.0
        self.spans: list[Span] = []
        self.events: list[Event] = []

    def close(self) -> None:
        if self._maybe_client is not None:
            self._maybe_client.close()
            self._maybe_client = None

    def runs(self) -> bool:
        """Whether the guest runs, as far as the emulator answers."""
        try:
            if self._maybe_client is None:
                self._maybe_client = QmpClient(self._monitor, _PATIENT_SECONDS)
                self._connected_at = time.time()
            asked = time.time()
            runs = str(self._maybe_client.command("query-status")["status"]) == "running"
        except CommandError:
            raise
        except MonitorError as error:
            self._read_what_is_left()
            if not isinstance(error.__cause__, TimeoutError):
                self._end()
            return False
        self._take_events()
        self._note(asked, runs=runs)
        return runs

    def _note(self, asked: float, *, runs: bool) -> None:
        if not runs:
            return
        if not self.spans or self.spans[-1].ended:
            self.spans.append(Span(self._connected_at, asked))  # no RESUME since: it ran already
        self.spans[-1].known = max(asked, self.spans[-1].began)

    def _take_events(self) -> None:
        for event in [] if self._maybe_client is None else self._maybe_client.take_events():
            self._take(event)

    def _read_what_is_left(self) -> None:
        """What an emulator that is gone told before."""
        if self._maybe_client is not None:
            with suppress(MonitorError):
                while (event := self._maybe_client.next_event(0.0)) is not None:
                    self._take(event)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if event.name == "RESUME":
            self.spans.append(Span(event.seconds, event.seconds))
        elif event.name == "STOP":
            if not self.spans or self.spans[-1].ended:
                self.spans.append(Span(min(self._connected_at, event.seconds), event.seconds))
            self.spans[-1].known, self.spans[-1].ended = event.seconds, True

    def _end(self) -> None:
        """The emulator is gone; nothing is known of its last moments."""
        self.close()
        if self.spans:
            self.spans[-1].ended = True

    def names(self) -> list[str]:
        """Of the events so far."""
        with suppress(MonitorError):
            self.runs()
        return [event.name for event in self.events]


def both_ran(here: EmulatorWatch, there: EmulatorWatch) -> list[tuple[Span, Span]]:
    """The times when both guests ran, which must be none."""
    return [
        (one, other)
        for one in here.spans
        for other in there.spans
        if one.began < other.known and other.began < one.known
    ]


def stopped_and_resumed(here: EmulatorWatch, there: EmulatorWatch) -> tuple[float, float]:
    """The guest's last moment here and its first one there, Unix time, by both emulators' events."""
    began = next(event.seconds for event in there.events if event.name == "RESUME")
    return max(event.seconds for event in here.events if event.name == "STOP" and event.seconds <= began), began
