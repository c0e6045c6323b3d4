"""Pages of a screen go ahead of the guest that writes it all the time, just before that stops.

An emulator whose log of writes forgets makes one pass while its guest runs (record 22), and all that was drawn since
goes while the guest stands. So near the end of that pass the emulator is held back: it writes into a socket that nobody
reads from. The guest runs on. Meanwhile its screen is read over its monitor, to learn when it is drawn and how long it
rests then; in the next rest its pages go as candidates, and the emulator is let go on so that it stops its guest at the
end of that rest. What it then sends and is equal to a candidate goes as a reference.

A wrong guess costs the link's time in that rest, and nothing else: what is equal is found in what the emulator sends.
Whatever fails here, the hand-over goes on without it.

Two threads: the monitor's reads and guesses, the relay's hands on. See docs/decisions/0032.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Protocol

from lazymem.errors import LazymemError, MonitorError
from lazymem.handover.pace import Pace
from lazymem.handover.screenrhythm import Drawing, areas, changed_pages
from lazymem.handover.screenstream import ScreenStream
from lazymem.handover.statepieces import MAX_PIECE_BYTES
from lazymem.vm.guestmemory import GuestMemory, displays
from lazymem.vm.qmpclient import QmpClient

TURN_SECONDS = 0.002
"""For a thread at the monitor that waits for events, between two looks whether the emulator is held."""

_HELD_SECONDS = 0.2
"""At most, of a hand-over's time. The guest runs meanwhile."""

_TAKEN_SECONDS = 0.02
"""Held no longer than that unless the thread at the monitor knows: it may be waiting for an emulator that has stopped
its guest all the same."""

_SILENT_SECONDS = 0.5
"""Held no longer than that without a piece, whatever became of the thread at the monitor."""

_AHEAD_SECONDS = 0.0025
"""Let go on so long before the rest's end: 0.3 to 2 ms to the stop, and looks that are 0.4 ms apart."""

_LAST_READ_SECONDS = 0.002
"""No reading begins later than so long before that."""

_FIRST_READ_BYTES = 256 * 1024
"""Then twice as much: the link has something to do soon, and a MiB takes 1 ms, a quarter of it 0.6."""

_MOST_READ_BYTES = 512 * 1024

_LEAST_SCREEN_BYTES = 1 << 20
"""A screen that is less than that when it is packed is not looked at: 8 ms of 1 Gb/s, in which the processors of both
ends are as busy with it, and with references no less."""

_LEAST_BYTES = 160 * 1024
"""A rest in which the link carries less is not made use of: 1.3 ms of 1 Gb/s, 13 of 100 Mb/s."""

_MOST_CARRIED = 2
"""Times as much as that is sent: a pass of what compresses well says too little of the link."""

_WAITING = 2
"""Pieces read ahead of the link."""

_GAP_PAGES = 16
"""Fewer pages that did not change are read with those around them."""


class _Held(enum.Enum):
    NOT_YET = enum.auto()
    IS = enum.auto()
    IS_KNOWN = enum.auto()
    NO_MORE = enum.auto()


class Memory(Protocol):
    """A running guest's, as `GuestMemory`."""

    def read(self, address: int, size: int) -> bytes: ...

    def close(self) -> None: ...


class ScreenAhead:
    """One hand-over's. `is_awaited`: the emulator may still be held, by which time `run_if_held` has to be called.
    `taken_seconds`: as long as the relay waits for that; `silent_seconds`: and for each piece then."""

    def __init__(self, stream: ScreenStream, pace: Pace, let_emulator_write: Callable[[], None]) -> None:
        self._stream = stream
        self._pace = pace
        self._let_emulator_write = let_emulator_write
        self._maybe_memory: Memory | None = None
        self._changed = threading.Condition()
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._left_bytes = self._sent_bytes = 0
        self._held = _Held.NOT_YET
        self.taken_seconds, self.silent_seconds = _TAKEN_SECONDS, _SILENT_SECONDS

    @property
    def is_awaited(self) -> bool:
        return self._maybe_memory is not None and self._held is not _Held.NO_MORE

    # ---- the relay's thread

    def hold(self, sent_bytes: int, send: Callable[[int, bytes], int]) -> None:
        """What it reads the emulator's state for waits here, until the emulator is let go on. `sent_bytes`: what of it
        has gone so far, as it is on the link. `send` hands candidates on, and says how many bytes they were there."""
        with self._changed:
            if self._held is _Held.NO_MORE or self._maybe_memory is None:
                return
            self._held, self._sent_bytes = _Held.IS, sent_bytes
            if not self._changed.wait_for(lambda: self._held is not _Held.IS, self.taken_seconds):
                self._held = _Held.NO_MORE
        while (maybe_piece := self._maybe_next()) is not None:
            count = send(*maybe_piece)
            with self._changed:
                self._left_bytes -= count
                self._changed.notify_all()

    def _maybe_next(self) -> tuple[int, bytes] | None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._pieces or self._held is _Held.NO_MORE, self.silent_seconds):
                self._held = _Held.NO_MORE
            if not self._pieces:
                return None
            self._changed.notify_all()
            return self._pieces.popleft()

    # ---- the monitor's thread

    def prepare(self, qmp: QmpClient) -> None:
        """Before the emulator sends. Where it says nothing of displays, or does not let its memory be read, it is
        never held."""
        with suppress(LazymemError, OSError, KeyError, TypeError):
            if places := displays(qmp):
                self.begin(places, GuestMemory(qmp))

    def begin(self, places: Collection[tuple[int, int]], memory: Memory) -> None:
        """`places`: address and size of what displays have in `memory`, which is closed at the end."""
        self._maybe_memory = memory
        self._stream.watch(places)

    def run_if_held(self) -> None:
        """Lets it go on again after 0.2 s at most."""
        with self._changed:
            if self._held is not _Held.IS or self._maybe_memory is None:
                return
            self._held = _Held.IS_KNOWN
            self._changed.notify_all()
        try:
            self._run(self._maybe_memory)
            self._close_memory()
        except (MonitorError, OSError):
            # It may be gone, of which whoever asks it next hears. Or it had less left to send than it has in hand, has
            # stopped its guest and answers nobody until we take its state: nor would it now that we are done.
            pass
        finally:
            with self._changed:
                self._held = _Held.NO_MORE
                self._changed.notify_all()

    def close(self) -> None:
        """At the end, or when it came to nothing."""
        self.let_go()
        self._close_memory()

    def _close_memory(self) -> None:
        if self._maybe_memory is not None:
            self._maybe_memory.close()
            self._maybe_memory = None

    def let_go(self) -> None:
        """From any thread, also a second time: it is not held (any more), and what waits to go ahead does not."""
        with self._changed:
            self._held = _Held.NO_MORE
            self._pieces.clear()
            self._changed.notify_all()

    def _run(self, memory: Memory) -> None:
        end = time.monotonic() + _HELD_SECONDS
        display, sent = self._stream.display, self._stream.sent
        assert display is not None

        def read(offset: int, size: int) -> bytes:
            if time.monotonic() > end:
                raise MonitorError("the guest's screen cannot be read in time")
            return memory.read(display.address + offset, size)

        if self._sent_bytes < _LEAST_SCREEN_BYTES:
            return
        changed = changed_pages(read, sent)
        if not changed or (maybe_rest := Drawing(read, changed[0], changed[-1], end).maybe_rest()) is None:
            return
        if time.monotonic() + 3 * maybe_rest.cycle_seconds < end:
            # Half of a screen may have been read before it was drawn the next time.
            changed = sorted({*changed, *changed_pages(read, sent)})
            if (maybe_rest := Drawing(read, changed[0], changed[-1], end).maybe_rest()) is None:
                return
        carried = int(self._pace.bytes_per_second * maybe_rest.seconds)
        if carried < _LEAST_BYTES:
            return
        self._left_bytes = _MOST_CARRIED * carried
        self._pace.open()
        until = maybe_rest.began + maybe_rest.seconds - _AHEAD_SECONDS
        self._pass_on(read, areas(changed, _GAP_PAGES), until)
        self._close_memory()  # and not when the guest stands
        while (left := until - time.monotonic()) > 0 and not self._is_sent():
            time.sleep(min(left, 0.0005))
        self._let_emulator_write()  # now, and not when the last candidates have left

    def _pass_on(self, read: Callable[[int, int], bytes], areas: Sequence[tuple[int, int]], until: float) -> None:
        """From the end on: the emulator begins with the first, which then leave in full, and the link has something to
        do while references are looked for in the others."""
        size = _FIRST_READ_BYTES
        for begin, at in reversed(areas):
            while at > begin:
                if not self._has_room(until - _LAST_READ_SECONDS):
                    return
                size, count = min(2 * size, _MOST_READ_BYTES), min(size, at - begin)
                at -= count
                data = read(at, count)
                with self._changed:
                    if self._held is _Held.NO_MORE:
                        return
                    pieces = [(at + o, data[o : o + MAX_PIECE_BYTES]) for o in range(0, count, MAX_PIECE_BYTES)]
                    self._pieces.extend(reversed(pieces))
                    self._changed.notify_all()

    def _has_room(self, until: float) -> bool:
        """Waits for it."""
        with self._changed:
            self._changed.wait_for(self._may_read, max(0.0, until - time.monotonic()))
            return self._may_read() and self._left_bytes > 0 and time.monotonic() < until

    def _may_read(self) -> bool:
        return self._held is _Held.NO_MORE or self._left_bytes <= 0 or len(self._pieces) < _WAITING

    def _is_sent(self) -> bool:
        with self._changed:
            return not self._pieces
