"""A process that stands still."""

from __future__ import annotations

import os
import signal
import time

from tests.support.processstatus import threads_of

_SECONDS = 30.0


def stop(pid: int) -> None:
    """SIGSTOP, and it stands when this returns.

    kill(2) tells one of its threads, which stops the others only when it next has a processor; until then they run.
    """
    os.kill(pid, signal.SIGSTOP)
    give_up = time.monotonic() + _SECONDS
    while any(status["State"][0] not in "TZX" for status in threads_of(pid)):
        assert time.monotonic() < give_up, f"process {pid} does not stop"
        time.sleep(0.001)
