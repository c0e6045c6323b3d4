"""Which processes came of which, as /proc tells."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from msgspec import Struct


class Found(Struct, frozen=True):
    pid: int
    parent: int
    is_zombie: bool
    session: int
    niceness: int


def maybe_process(pid: int) -> Found | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended
        return None
    return Found(pid, int(fields[1]), fields[0] == "Z", int(fields[3]), int(fields[16]))


def is_gone(pid: int) -> bool:
    found = maybe_process(pid)
    return found is None or found.is_zombie


def sleeps(pid: int) -> bool:
    """Whether its first thread waits for something, and so has taken every signal that was sent to it before."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def children_of(pid: int) -> list[Found]:
    """Those that live."""
    all_of_them = (maybe_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [found for found in all_of_them if found is not None and found.parent == pid and not found.is_zombie]


def descendants_of(pid: int) -> list[int]:
    """Parents before their children."""
    found = []
    for child in children_of(pid):
        found += [child.pid, *descendants_of(child.pid)]
    return found


def fillers_of(daemon: int) -> list[int]:
    """Children that a mount's daemon forked: not its supervisor, which has a session of its own."""
    maybe_daemon = maybe_process(daemon)
    return [found.pid for found in children_of(daemon) if maybe_daemon and found.session == maybe_daemon.session]


def started_with(name: str, value: str) -> list[int]:
    """Those that live and have this in their environment: daemons too, which are nobody's children."""
    found, entry = [], f"{name}={value}".encode()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and not is_gone(pid):
                found.append(pid)
    return found


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
