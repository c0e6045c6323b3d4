"""Kernel knobs of one mount: the dirty throttle, read-ahead, background slots.

The kernel lets a FUSE mount hold 1 % of the host's dirty memory and throttles it strictly, which slows a guest's
writes by a factor of fifty. Lifting that needs root; where it is not permitted we say so and go on. Only our own
connection's files are written: another one's belong to somebody's guest.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from pathlib import Path

from msgspec import Struct

from lazymem.fs.syscalls import system_call

log = logging.getLogger(__name__)

READ_AHEAD_KB = 128
"""One request of `max_read`: what the kernel guesses around a touch. Guessing further is ours, where it is measured."""

_PR_SET_IO_FLUSHER = 57
"""Since Linux 5.6."""

MAX_BACKGROUND = 64
"""Read-ahead and write-back requests at a time (kernel's default: 12), so that a sweep leaves slots for the guest."""

CONGESTION_THRESHOLD = 8
"""Requests that wait, above which the kernel begins no more write-back: a guest that writes to a page on its way here
waits for all that is before it. (Its own read-ahead is not sent either then; guessing is ours.)"""


class Knob(Struct, frozen=True):
    path: Path
    value: str
    meaning: str


def knobs(major: int, minor: int, *, sysfs: Path = Path("/sys")) -> list[Knob]:
    """What to write where, for the mount with that device number."""
    bdi = sysfs / "class/bdi" / f"{major}:{minor}"
    connection = sysfs / "fs/fuse/connections" / str(minor)
    return [
        Knob(bdi / "strict_limit", "0", "the dirty throttle stays on: the guest's writes will be slow"),
        Knob(bdi / "max_ratio", "100", "the dirty limit stays at 1 %: the guest's writes will be slow"),
        Knob(bdi / "read_ahead_kb", str(READ_AHEAD_KB), "read-ahead stays as it is"),
        Knob(connection / "max_background", str(MAX_BACKGROUND), "background slots stay as they are"),
        Knob(connection / "congestion_threshold", str(CONGESTION_THRESHOLD), "congestion threshold stays"),
    ]


def ensure_fusectl() -> None:
    """Mount the kernel's control files for FUSE connections where no init system did. Without the right to, do nothing:
    `apply` then names what it could not turn."""
    connections = Path("/sys/fs/fuse/connections")
    if os.geteuid() == 0 and not os.path.ismount(connections):
        with contextlib.suppress(OSError):
            system_call("mount", b"none", os.fsencode(connections), b"fusectl", 0, b"")


def become_io_flusher() -> bool:
    """Tell the kernel that memory is written out through this process and the threads it will start (prctl(2)).

    A guest may fill the host's limit of dirty memory; our own writes to the state file would then be held back for dirt
    that only they can clean. Needs CAP_SYS_RESOURCE; False where that is missing.
    """
    try:
        system_call("prctl", _PR_SET_IO_FLUSHER, *(ctypes.c_ulong(word) for word in (1, 0, 0, 0)))
    except OSError as error:
        log.debug(
            "no I/O flusher (%s): a guest that dirties the host's memory may slow its own write-back", error.strerror
        )
        return False
    return True


def apply(wanted: list[Knob]) -> list[Knob]:
    """Turn the knobs; log and return those that could not be turned."""
    failed = []
    for knob in wanted:
        try:
            knob.path.write_text(knob.value)
        except OSError as error:
            log.warning("%s (%s: %s); run as root to lift it", knob.meaning, knob.path, error.strerror)
            failed.append(knob)
    return failed
