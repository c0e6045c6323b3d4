"""How long a supervisor waits before it tries the next daemon, and what it says of that."""

from __future__ import annotations

import logging
import select
import time

log = logging.getLogger("lazymem.supervisor")

FIRST_PAUSE_SECONDS = 0.05
MAX_PAUSE_SECONDS = 5.0
"""Between daemons that ended before they were ready, one after the other."""

LOUD_FAILURES = 8
"""So many in a row, within some 12 s, and it is said that nothing goes on, and again each `LOUD_SECONDS`."""

LOUD_SECONDS = 60.0

CROWD = 16
CROWD_SECONDS = 30.0
CROWDED_PAUSE_SECONDS = 1.0
"""So many deaths within so long, of daemons that were ready: something kills each. Others want the processor too."""


class Patience:
    """Remembers deaths and complaints."""

    def __init__(self) -> None:
        self._loud_at = 0.0
        self._deaths: list[float] = []

    def note_death(self) -> bool:
        """A daemon died; whether so many did of late that there should be a pause."""
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if at > now - CROWD_SECONDS] + [now]
        return len(self._deaths) > CROWD

    def note_failure(self, what: str, failures: int, connection: int) -> None:
        """Say it, not for ever each time; then the pause before the next try, or until the mount over `connection` is
        over. `failures`: in a row, with this one."""
        now = time.monotonic()
        if failures < LOUD_FAILURES:
            log.error("%s", what)
        elif now > self._loud_at:
            self._loud_at = now + LOUD_SECONDS
            log.error(
                "%s: failure %d in a row. The guest waits, and it is tried again for as long as it is mounted; what "
                "the daemons log says why (no room? no memory?). 'lazymem umount --force' gives up",
                what,
                failures,
            )
        over = select.poll()
        over.register(connection, 0)
        over.poll(_pause_seconds(failures) * 1000)


def _pause_seconds(failures: int) -> float:
    return float(min(FIRST_PAUSE_SECONDS * 2 ** min(failures - 1, 16), MAX_PAUSE_SECONDS))
