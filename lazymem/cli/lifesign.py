"""A daemon's sign of life: ends at once when the daemon is killed, also when one of its threads cannot end yet.

Such a thread waits in the kernel for the mount, that is for the daemon itself, and so until the next one answers it.
Until then the process has not ended, none of its files is closed, and nothing tells whoever waits for its end, who
would have to look again and again. So a thread that waits for nothing has a pipe's end to itself, in a table of open
files of its own: it ends with the others, and closes that.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import signal

_CLONE_FILES = 0x400
"""linux/sched.h."""


def maybe_life_sign() -> int | None:
    """A descriptor on which poll(2) says POLLHUP from then on; None: this host makes none. (Its supervisor then looks
    once a second.)

    The thread stays for as long as the process. To be called before there are files open whose closing waits for
    somebody, and behind the last fork without exec.
    """
    read_end, write_end = os.pipe()
    is_made = _thread.allocate_lock()
    is_made.acquire()
    owns: list[bool] = []

    def hold() -> None:
        try:
            owns.append(_own_nothing_but(write_end))
        except (AttributeError, MemoryError):  # a C library without unshare, for one
            owns.append(False)
        finally:  # whoever waits for us is a daemon that begins, and a guest for that
            is_made.release()
        if owns[0]:
            never = _thread.allocate_lock()
            never.acquire()
            never.acquire()

    # No signal is to be handled there: what wakes the event loop has another number, or none, in that table.
    before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        _thread.start_new_thread(hold, ())  # one that `threading` does not know, and does not wait for
        is_made.acquire()
    except RuntimeError:  # a limit on threads
        owns.append(False)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(write_end)
    if owns and owns[0]:
        return read_end
    os.close(read_end)
    return None


def _own_nothing_but(descriptor: int) -> bool:
    """For this thread; whether it has a table of its own now."""
    try:
        if ctypes.CDLL(None).unshare(_CLONE_FILES):
            return False
        last = max(int(name) for name in os.listdir("/proc/thread-self/fd"))
    except OSError:
        return False
    os.closerange(0, descriptor)
    os.closerange(descriptor + 1, last + 1)
    return True
