"""How a file is read without waiting for a disk: the flags for preadv(2), and which files lie in memory."""

from __future__ import annotations

import os

_MOUNTINFO = "/proc/self/mountinfo"


def nowait_flags(fd: int) -> int:
    """RWF_NOWAIT, but 0 for a file in memory: tmpfs refuses it, and reading that waits for no disk (short of swap)."""
    return 0 if is_in_memory(fd) else os.RWF_NOWAIT


def is_in_memory(fd: int) -> bool:
    """Whether the open file is one in memory; False, too, where its disk does not say what it is."""
    try:
        return lies_in_memory(os.fstat(fd).st_dev)
    except OSError:
        return False


def lies_in_memory(device: int) -> bool:
    """Whether the file system with this `st_dev` is one in memory (tmpfs, ramfs)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open(_MOUNTINFO, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
    except OSError:  # no /proc: then reads go through a thread, which is only slower
        pass
    return False
