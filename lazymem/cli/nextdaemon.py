"""The daemon that comes next, loaded beforehand by a supervisor: a spare, or another version that somebody wants."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from lazymem.cli.daemonprocess import Daemon, Starter

WARM_SECONDS = 60.0
"""For a next daemon to load what it needs; the present one serves meanwhile."""


class NextDaemon:
    """At most one at a time. `refuse`: tells whoever wants an upgrade why there is none."""

    def __init__(self, starter: Starter, refuse: Callable[[str], None]) -> None:
        self._starter = starter
        self._refuse = refuse
        self.maybe_daemon: Daemon | None = None
        self._upgrading = False  # to that

    def load(self, python: str) -> None:
        """A spare, of the version that serves; none where none can be started."""
        with contextlib.suppress(OSError):
            self.maybe_daemon = self._starter.start(python)

    def begin_upgrade(self, python: str) -> bool:
        """Load one of `python`; False: refused, and nothing has changed."""
        if self._upgrading:
            self._refuse("another upgrade is under way")
            return False
        if self.maybe_daemon is not None:  # of the version that we have
            self._starter.discard(self.maybe_daemon)
        self.maybe_daemon = None
        try:
            self.maybe_daemon = self._starter.start(python)
        except OSError as error:
            self._refuse(f"{python} cannot be started: {error.strerror}")
            return False
        self._upgrading = True
        return True

    @property
    def word_when_loaded(self) -> str:
        """What the present daemon is told then."""
        return "HANDOVER" if self._upgrading else "LOADED"

    def give_up_lost(self) -> bool:
        """Whether it died, or takes too long, and so is there no more."""
        daemon = self.maybe_daemon
        if daemon is None:
            return False
        if not daemon.is_dead() and (daemon.is_warm or time.monotonic() <= daemon.started_at + WARM_SECONDS):
            return False
        self.maybe_daemon = None
        self._starter.discard(daemon)
        if self._upgrading:
            self._refuse("the new version's daemon does not start")
        self._upgrading = False
        return True

    def take(self) -> Daemon | None:
        """It is not the next one any more, but the one."""
        found, self.maybe_daemon = self.maybe_daemon, None
        self._upgrading = False
        return found
