"""A log that strangers cannot fill: some lines in a while, then how many were left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("lazymem.server")

MOST_LINES = 20
SECONDS = 10.0
"""Twenty lines show what goes on; a thousand connections a second would fill the disk with the same one."""


class FewLines:
    """Warnings about strangers. `left_out`: how many are still to be told of, with the next one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.left_out = 0
        self._clock = clock
        self._said = 0
        self._since = clock()

    def warning(self, text: str, *arguments: object) -> None:
        """As a logger's."""
        now = self._clock()
        if now - self._since >= SECONDS:
            if self.left_out:
                log.warning("%d more connections were refused in %.0f s", self.left_out, now - self._since)
            self.left_out, self._said, self._since = 0, 0, now
        if self._said < MOST_LINES:
            self._said += 1
            log.warning(text, *arguments)
        else:
            self.left_out += 1
