"""How soon a thread that wakes up gets a processor that others are using: Linux 6.12's slices of the fair scheduler.

A thread that asks for short slices is let in sooner, for no larger share of the processor: each is a smaller part of
the same time, and the next one is due later. That suits whoever is waited for and does little at a time. (The request
is `sched_attr.sched_runtime` of an ordinary task, sched_setattr(2); nobody needs a permission for it.)
"""

from __future__ import annotations

import ctypes
import os
import struct

SHORTEST_SECONDS = 0.0001
"""The kernel's own lower bound; its default is 3 ms, and a guest's processors that are threads here use all of that."""

_SYS_SCHED_SETATTR = 314 if os.uname().machine == "x86_64" else 274
"""x86-64, and what all newer architectures share."""

_SCHED_ATTR = struct.Struct("=IIQiIQQQ")
"""size, policy, flags, nice, priority, runtime, deadline, period; times in nanoseconds."""

_SCHED_OTHER = 0


def ask_for_short_slices() -> bool:
    """For this thread and those that it starts from now on; whether the kernel agreed (one before 6.12 does, too, and
    changes nothing). Only for a thread of the ordinary policy: another one stays what it is."""
    try:
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            return False
        nice = os.getpriority(os.PRIO_PROCESS, 0)
    except OSError:
        return False
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, _SCHED_OTHER, 0, nice, 0, round(SHORTEST_SECONDS * 1e9), 0, 0)
    failed: int = ctypes.CDLL(None).syscall(_SYS_SCHED_SETATTR, 0, ctypes.c_char_p(attributes), 0)
    return not failed
