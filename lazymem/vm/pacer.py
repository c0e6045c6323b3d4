"""A thread that ends slices in time. It sleeps while nothing is armed: a halted or stopped guest costs nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_AGAIN_SECONDS = 0.0005
"""The CPU may lose a request (see cpu_engine); it is repeated until the slice has ended."""


class SlicePacer:
    """`arm` before a slice, `disarm` behind it, both on the vCPU's thread; `end_slice` is called on the pacer's."""

    def __init__(self, end_slice: Callable[[], None]) -> None:
        self._end_slice = end_slice
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._sleeping_until: float | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="vcpu pacer", daemon=True)
        self._thread.start()

    def arm(self, after_ns: int) -> None:
        with self._changed:
            self._deadline = time.monotonic() + after_ns / 1e9
            # While it sleeps to an earlier time, it will look for itself: no wake-up a slice.
            if self._sleeping_until is None or self._deadline < self._sleeping_until:
                self._changed.notify()

    def disarm(self) -> None:
        with self._changed:
            self._deadline = None

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._closing:
                if self._deadline is None:
                    self._sleep(None)
                    continue
                now = time.monotonic()
                if now < self._deadline:
                    self._sleep(self._deadline)
                    continue
                self._end_slice()
                self._deadline = now + _AGAIN_SECONDS

    def _sleep(self, until: float | None) -> None:
        self._sleeping_until = until
        self._changed.wait(None if until is None else max(0.0, until - time.monotonic()))
        self._sleeping_until = None
