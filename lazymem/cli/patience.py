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
    """Remembers deaths and complaints. `failures`: in a row; `connection`: the mount's, whose end ends each pause."""

    def __init__(self) -> None:
        self.failures = 0
        self._loud_at = 0.0
        self._deaths: list[float] = []

    def note_death(self, pid: int, was_ready: bool, connection: int) -> None:
        """Of a daemon; then the pause before the next one, if there should be one."""
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if at > now - CROWD_SECONDS] + [now]
        if not was_ready:
            self.note_failure(f"the daemon (pid {pid}) ended before it was ready", connection)
        elif len(self._deaths) > CROWD:
            _pause(CROWDED_PAUSE_SECONDS, connection)

    def note_failure(self, what: str, connection: int) -> None:
        """Say it, not for ever each time; then the pause before the next try."""
        self.failures += 1
        now = time.monotonic()
        if self.failures < LOUD_FAILURES:
            log.error("%s", what)
        elif now > self._loud_at:
            self._loud_at = now + LOUD_SECONDS
            log.error(
                "%s: failure %d in a row. The guest waits, and it is tried again for as long as it is mounted; what "
                "the daemons log says why (no room? no memory?). 'lazymem umount --force' gives up",
                what,
                self.failures,
            )
        _pause(min(FIRST_PAUSE_SECONDS * 2 ** min(self.failures - 1, 16), MAX_PAUSE_SECONDS), connection)


def _pause(seconds: float, connection: int) -> None:
    over = select.poll()
    over.register(connection, 0)
    over.poll(seconds * 1000)
