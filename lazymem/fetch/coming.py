"""Which pages two processes of one mount have on their way: who guesses, and who demands. Memory that both have mapped.

Each has a byte a page of its own there, which only it writes, so neither asks for what the other one brings already.
The guesses' byte is the number of a request, and for each number stands when that was sent: so whoever demands can tell
whether a page is here before the answer to a question asked now could be.

A byte that is seen too late costs a page that is fetched twice. None is left behind that would keep a page from ever
being fetched: who guesses looks again, and who demands waits for a stated time.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from collections.abc import Iterator, Sequence

from lazymem.pages import PageRange

REQUESTS = 254
"""Numbered ones at a time, many times as many as a window has; of more, nobody can tell when their pages come."""

UNNUMBERED = 255

SMOOTHING = 0.125
"""Of times, and of how much they vary: Jacobson, "Congestion Avoidance and Control", SIGCOMM 1988."""

VARIATIONS = 2.0
"""Beyond its usual time a request is late from so many usual deviations on: two of a hundred are, if not less."""

_HEAD_BYTES = 4096
_WAITED_FOR, _TAKES, _VARIES, _RATE, _SENT = 0, 1, 2, 3, 4  # words of the head; from the last one on, one a number
_IS_COMING = bytes([0]) + bytes([1]) * 255


def shared_memory(pages: int) -> int:
    """A descriptor of memory for a `Coming` in two processes. Neither can shorten it under the other one."""
    fd = os.memfd_create("coming", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _HEAD_BYTES + 2 * pages)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class Coming:
    """For a RAM of `pages` pages. All times are seconds of `perf_counter`, which is the host's."""

    def __init__(self, pages: int, fd: int = -1) -> None:
        """`fd`: memory that `shared_memory` made, which stays the caller's; without it nobody else sees this."""
        size = _HEAD_BYTES + 2 * pages
        flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(fd, size, flags)
        self._words = memoryview(self._map)[:_HEAD_BYTES].cast("d")
        self._demanded_at = _HEAD_BYTES + pages
        self._free = list(range(REQUESTS, 0, -1))

    # ---- who guesses

    def begin(self, now: float) -> int:
        """The number of a request that is sent now."""
        if not self._free:
            return UNNUMBERED
        number = self._free.pop()
        self._words[_SENT + number] = now
        return number

    def guess(self, number: int, pages: PageRange) -> None:
        """It brings `pages`."""
        self._map[_HEAD_BYTES + pages.start : _HEAD_BYTES + pages.end] = bytes([number]) * pages.count

    def end(self, number: int, ranges: Sequence[PageRange], maybe_now: float | None = None) -> None:
        """Its pages are kept, since `maybe_now`, or do not come any more."""
        for pages in ranges:
            self._map[_HEAD_BYTES + pages.start : _HEAD_BYTES + pages.end] = bytes(pages.count)
        if number == UNNUMBERED:
            return
        self._free.append(number)
        if maybe_now is not None:
            self._note(maybe_now - self._words[_SENT + number])

    def _note(self, took: float) -> None:
        words = self._words
        if not words[_TAKES]:
            words[_VARIES], words[_TAKES] = took / 2, took
            return
        error = took - words[_TAKES]
        words[_TAKES] += SMOOTHING * error
        words[_VARIES] += SMOOTHING * (abs(error) - words[_VARIES])

    def is_demanded(self, pages: PageRange) -> bool:
        """Whether who demands has any of them on its way."""
        return bool(self._map[self._demanded_at + pages.start : self._demanded_at + pages.end].strip(b"\0"))

    def free(self, pages: PageRange) -> list[PageRange]:
        """The parts that nobody has on its way."""
        guessed = self._map[_HEAD_BYTES + pages.start : _HEAD_BYTES + pages.end]
        demanded = self._map[self._demanded_at + pages.start : self._demanded_at + pages.end]
        if not guessed.strip(b"\0"):
            return list(_zero_runs(demanded, pages.start))
        if demanded.strip(b"\0"):
            both = int.from_bytes(guessed, "little") | int.from_bytes(demanded, "little")
            guessed = both.to_bytes(pages.count, "little")
        return list(_zero_runs(guessed, pages.start))

    def tell_rate(self, bytes_per_second: float) -> None:
        """What the link lately brought to who guesses."""
        self._words[_RATE] = bytes_per_second

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody waits for a page that is guessed."""
        return self._words[_WAITED_FOR] > 0

    # ---- who demands, and guesses around it

    def demand(self, pages: PageRange) -> None:
        """They are asked for, or here and not kept."""
        self._map[self._demanded_at + pages.start : self._demanded_at + pages.end] = b"\1" * pages.count

    def forget(self, pages: PageRange) -> None:
        """They are kept, or do not come any more."""
        self._map[self._demanded_at + pages.start : self._demanded_at + pages.end] = bytes(pages.count)

    @property
    def bytes_per_second(self) -> float:
        """What the link lately brought to who guesses; 0: nothing is known."""
        return self._words[_RATE]

    def is_guessed(self, page: int) -> bool:
        """Whether the other process has it on its way."""
        return self._map[_HEAD_BYTES + page] != 0

    def not_guessed(self, pages: PageRange) -> list[PageRange]:
        """The parts that the other process does not have on its way."""
        return list(_zero_runs(self._map[_HEAD_BYTES + pages.start : _HEAD_BYTES + pages.end], pages.start))

    def maybe_wait(self, pages: PageRange, now: float, answer_seconds: float) -> float | None:
        """Until when to wait for the other process to bring all of `pages`, rather than to ask.

        Args:
            answer_seconds: the least time that an answer to a question asked now takes.

        Returns:
            None: ask, as not all of them are on their way, or would be here later, or are overdue. Else when they are
            overdue; in no longer than `answer_seconds`.
        """
        numbers = self._map[_HEAD_BYTES + pages.start : _HEAD_BYTES + pages.end]
        if 0 in numbers or UNNUMBERED in numbers:
            return None
        words = self._words
        sent = max([words[_SENT + number] for number in set(numbers)])
        takes, latest = words[_TAKES], now + answer_seconds
        overdue = sent + takes + VARIATIONS * words[_VARIES]
        # Whatever the words are: who guesses takes apart what a server sends, and is not believed more than need be.
        if takes and sent + takes <= latest < math.inf and overdue > now:
            return min(overdue, latest)
        return None

    def note_waiting(self, count: int) -> None:
        """So many demands wait for the other process."""
        self._words[_WAITED_FOR] = float(count)


def _zero_runs(states: bytes, first: int) -> Iterator[PageRange]:
    if not states.strip(b"\0"):
        yield PageRange(first, len(states))
        return
    states = states.translate(_IS_COMING)
    start = states.find(b"\0")
    while start >= 0:
        end = states.find(b"\1", start)
        end = len(states) if end < 0 else end
        yield PageRange(first + start, end - start)
        start = states.find(b"\0", end)
