"""How far a lazymem mount has come: asked of its daemon, by an attribute.

An answer costs the daemon a millisecond or more of what is being measured, so it is asked seldom until the end is near.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from bench.way import Mount, WayError

MIN_POLL_SECONDS = 0.005
MAX_POLL_SECONDS = 0.2
POLL_SHARE = 0.15
"""Of the time that is probably left; the end is then seen a few milliseconds late."""

GIVE_UP_SECONDS = 300.0


@dataclass(slots=True)
class Progress:
    """Seconds since the mount's command began, and pages held then."""

    seconds: list[float] = field(default_factory=list)
    pages: list[float] = field(default_factory=list)

    def series(self) -> dict[str, list[float]]:
        step = max(1, len(self.pages) // 500)
        return {"held_at_seconds": self.seconds[::step], "held_pages": self.pages[::step]}


def wait_held(mount: Mount) -> Progress:
    """Until every page is here.

    Raises:
        WayError: it takes longer than any link needs.
    """
    progress = Progress()
    while True:
        status = mount.status()
        now = time.perf_counter() - mount.started
        progress.seconds.append(now)
        progress.pages.append(status["pages_held"])
        if status["pages_held"] >= status["pages_total"]:
            return progress
        if now > GIVE_UP_SECONDS:
            raise WayError(f"{status['pages_held']} of {status['pages_total']} pages held after {now:.0f} s")
        time.sleep(_pause(progress, status["pages_total"]))


def _pause(progress: Progress, total: float) -> float:
    """From the rate since the start."""
    held = progress.pages[-1] - progress.pages[0]
    if not held:
        return MIN_POLL_SECONDS * 4
    left = (total - progress.pages[-1]) * (progress.seconds[-1] - progress.seconds[0]) / held
    return min(max(left * POLL_SHARE, MIN_POLL_SECONDS), MAX_POLL_SECONDS)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process, all its threads."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
