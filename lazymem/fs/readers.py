"""Who makes a request: whether the thread is being killed, whether it is one of our own."""

from __future__ import annotations

import os
import signal

_FIELDS = (b"SigPnd:", b"ShdPnd:")


def is_our_own(thread: int) -> bool:
    """Whether the thread with that id belongs to this process."""
    return thread > 0 and os.path.exists(f"/proc/self/task/{thread}")


def is_killed(thread: int) -> bool:
    """Whether SIGKILL is on its way to the thread with that id, or the thread is gone. 0, which stands for a thread
    that we cannot see, is never."""
    if thread <= 0:
        return False
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            lines = file.readlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    pending = (int(line.split()[1], 16) for line in lines if line.startswith(_FIELDS))
    return any(mask >> (signal.SIGKILL - 1) & 1 for mask in pending)
