"""The main process of a mount's unit, as a program: `lazymem-mount -f`, whose systemd is a `StandInSystemd`.

    python -m tests.support.unitprocess DIES_AT NAME=DESCRIPTOR[:...] ARGUMENT...

It gets what was kept, and is killed when it is about to tell systemd of a descriptor whose name begins with DIES_AT, or
has done so ("...+"); "READY": that the mount is ready; "": never.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable

from lazymem.cli import mount, unit
from lazymem.fs import descriptorstore

BEYOND = 200
"""Above all that systemd would give."""


def take_places(kept: str) -> None:
    """As systemd gives them: from `FIRST_LISTENED` on, and named in the environment."""
    named = [each.rpartition("=")[::2] for each in kept.split(":") if each]
    moved = [fcntl.fcntl(int(number), fcntl.F_DUPFD, BEYOND) for _, number in named]
    for _, number in named:
        os.close(int(number))
    for place, descriptor in enumerate(moved, descriptorstore.FIRST_LISTENED):
        os.dup2(descriptor, place)
        os.close(descriptor)
    if named:
        names = ":".join(name for name, _ in named)
        os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(named)), "LISTEN_FDNAMES": names}


class Dying(unit.UnitSupervisor):
    dies_at = ""

    def _tell(self, what: Callable[..., None], *words: object) -> None:
        told = "READY" if what is descriptorstore.send else words[0] if what is descriptorstore.put else ""
        is_it = bool(self.dies_at) and str(told).startswith(self.dies_at.rstrip("+"))
        if is_it and not self.dies_at.endswith("+"):
            os.kill(os.getpid(), signal.SIGKILL)
        super()._tell(what, *words)
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    Dying.dies_at, kept, *arguments = sys.argv[1:]
    take_places(kept)
    unit.UnitSupervisor = Dying  # type: ignore[misc]  # what `unit.supervise` makes
    return mount.main(["-f", *arguments])


if __name__ == "__main__":
    sys.exit(main())
