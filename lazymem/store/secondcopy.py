"""Rule 12: what the kernel caches of the mount's file it need not cache of our files once more. One thread a file.

Pages that the guest's kernel has got are named here, and a moment later the kernel is asked to let go of our file's
copy of them. A page that is not on the disk yet only begins its way there when asked, so it is asked again. All of it
is advice: where a file system does not take it (one in memory), nothing is lost, and nothing is won.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable

from lazymem.pages import PAGE_SHIFT

GATHER_SECONDS = 0.1
"""What is named in so long a time is let go together: neighbours in one call. A guest that reads 300 MB a second leaves
30 MB to be let go."""

_ROUNDS_UNTIL_ASKED = (0, 1, 10)
"""At once, for what is on the disk; after that, for what a disk takes in a tenth of a second; and after a second, for
one that was busy."""

_NOTHING: list[tuple[int, int]] = []

MAX_NAMED = 1 << 16
"""Ranges that wait: 10 MB. Beyond, the oldest stay cached until the kernel itself wants their room."""


class SecondCopy:
    """Lets go of pages of the open file `fd`, which stays the caller's. No thread before the first page is named."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._named: deque[tuple[int, int]] = deque(maxlen=MAX_NAMED)
        self._something = threading.Event()
        self._thread: threading.Thread | None = None
        self._over = False

    def let_go(self, start_page: int, end_page: int) -> None:
        """The kernel has these pages elsewhere. Returns at once."""
        if self._over:
            return
        self._named.append((start_page, end_page))
        if self._thread is None:
            self._begin()
        if not self._something.is_set():
            self._something.set()

    def _begin(self) -> None:
        # Its own descriptor, so that closing the file waits for nobody.
        fd = -1
        try:
            fd = os.dup(self._fd)
            self._thread = threading.Thread(target=self._run, args=(fd,), name="second copy", daemon=True)
            self._thread.start()
        except (OSError, RuntimeError):  # no descriptor or no thread for us: it is only advice, and no reader's failure
            self._over = True
            if fd >= 0:
                os.close(fd)

    def close(self) -> None:
        """No more. What was named may still be let go of; does not wait for that."""
        self._over = True
        self._something.set()

    def _run(self, fd: int) -> None:
        try:
            rounds = deque([_NOTHING] * (_ROUNDS_UNTIL_ASKED[-1] + 1), maxlen=_ROUNDS_UNTIL_ASKED[-1] + 1)
            while True:
                if not any(rounds):
                    self._something.wait()
                time.sleep(GATHER_SECONDS)
                self._something.clear()  # before the looks: what comes from here on sets it again
                if self._over:
                    return
                rounds.append(merged([self._named.popleft() for _ in range(len(self._named))]))
                for age in _ROUNDS_UNTIL_ASKED:
                    _ask(fd, rounds[-1 - age])
        finally:
            os.close(fd)


def _ask(fd: int, ranges: Iterable[tuple[int, int]]) -> None:
    for start, end in ranges:
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT, os.POSIX_FADV_DONTNEED)


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) pairs as the fewest that cover the same, in ascending order."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found
