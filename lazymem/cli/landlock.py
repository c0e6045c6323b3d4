"""Landlock (landlock(7)): a process shuts itself out of the file system, root's too, but for what it has open.

Reading stays: certificates are renewed, names are looked up.
"""

from __future__ import annotations

import ctypes
import os
import struct

_SYS_CREATE_RULESET, _SYS_RESTRICT_SELF = 444, 446  # on every architecture
_CREATE_RULESET_VERSION = 1

_EXECUTE, _WRITE_FILE = 1 << 0, 1 << 1
_REMOVE_DIR, _REMOVE_FILE = 1 << 4, 1 << 5
_MAKE = 0x7F << 6  # character devices, folders, files, sockets, pipes, block devices, symbolic links
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_SCOPE_SIGNAL = 1 << 1

_RULESET = struct.Struct("=QQQ")
"""`landlock_ruleset_attr`: file system, network, scopes. A kernel that knows less of it takes zeros for the rest."""


def landlock_version() -> int:
    """What the kernel has of it, from 1 (Linux 5.13) on; 0: it is too old, or Landlock is off."""
    libc = ctypes.CDLL(None)
    found = libc.syscall(ctypes.c_long(_SYS_CREATE_RULESET), None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION)
    return max(0, int(found))


def shut_out_of_files() -> bool:
    """From here on this thread, and those that it starts, cannot open a file for writing, make, remove, move, truncate
    or execute one; nor, from Linux 6.12 on, send a signal to others. For good. Needs `no_new_privileges`.

    Whether the kernel does that: see `landlock_version`.
    """
    version = landlock_version()
    if not version:
        return False
    libc = ctypes.CDLL(None)
    handled = _EXECUTE | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE
    handled |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    attributes = _RULESET.pack(handled, 0, _SCOPE_SIGNAL if version >= 6 else 0)
    ruleset = libc.syscall(
        ctypes.c_long(_SYS_CREATE_RULESET), ctypes.c_char_p(attributes), ctypes.c_size_t(len(attributes)), 0
    )
    if ruleset < 0:
        return False
    try:
        return not libc.syscall(ctypes.c_long(_SYS_RESTRICT_SELF), ctypes.c_int(ruleset), 0)
    finally:
        os.close(ruleset)
