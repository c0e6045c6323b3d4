"""Root's rights that a process does not need, given up for good (capabilities(7)): who takes it over does not get them.

A thread's own: called before there are others, so that all that it starts have no more.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from enum import IntEnum

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_CAPABILITY_VERSION_3 = 0x20080522

_MAX_CAPABILITIES = 64
"""Bits of a capability set; the kernel knows 41, and refuses the others."""


class Capability(IntEnum):
    """By its bit (<linux/capability.h>); those that something of ours needs."""

    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    IPC_LOCK = 14
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    SYS_NICE = 23
    SYS_RESOURCE = 24


def keep_only(kept: Collection[Capability]) -> None:
    """No more than `kept` of what this thread has, in all its sets; nothing is added.

    A program that it executes can have no more either, where we may say so (CAP_SETPCAP); else see
    `no_new_privileges`.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(_MAX_CAPABILITIES):
        if capability not in kept:
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of bits 0 to 31, then of the others
    _called(libc.capget(header, sets))
    mask = sum(1 << capability for capability in kept)
    for index in range(6):
        sets[index] &= (mask >> (32 * (index // 3))) & 0xFFFFFFFF
    _called(libc.capset(header, sets))


def no_new_privileges() -> None:
    """No program that this thread executes gets more rights than it has: not by a set-user-id bit, nor by being root's.

    Raises:
        OSError: the kernel refuses.
    """
    _called(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _called(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
