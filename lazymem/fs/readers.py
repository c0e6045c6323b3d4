"""Who makes a request: whether the thread is being killed."""

from __future__ import annotations

import signal

_FIELDS = (b"SigPnd:", b"ShdPnd:")


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
