"""mlock2(2) for a map that Python only lets us read: pages that were touched stay in memory."""

from __future__ import annotations

import ctypes
import mmap

_MLOCK_ONFAULT = 1  # <bits/mman-shared.h>


class _Buffer(ctypes.Structure):
    """Python's `Py_buffer`; how else to learn where a read-only map lies?"""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def lock_what_is_touched(mapped: mmap.mmap) -> bool:
    """Whether pages of `mapped` are locked from their first touch on; not beyond RLIMIT_MEMLOCK."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mlock2"):  # a C library of before 2018
        return False
    buffer = _Buffer()
    get, release = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
    get.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
    release.argtypes = (ctypes.POINTER(_Buffer),)
    get(mapped, ctypes.byref(buffer), 0)
    try:
        return not libc.mlock2(ctypes.c_void_p(buffer.buf), ctypes.c_size_t(buffer.len), _MLOCK_ONFAULT)
    finally:
        release(ctypes.byref(buffer))
