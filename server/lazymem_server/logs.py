"""What is logged of a host without a descriptor for one more client: trio says it ten times a second, with a trace."""

from __future__ import annotations

import logging
import time

PAUSE_SECONDS = 10.0


class OneLineNowAndThen(logging.Filter):
    """Lets a record through each ten seconds, without its traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._silent_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = None
        now = time.monotonic()
        if now < self._silent_until:
            return False
        self._silent_until = now + PAUSE_SECONDS
        return True
