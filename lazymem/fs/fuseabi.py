"""The part of the kernel's FUSE protocol that we speak ourselves: READ and WRITE. Pure.

Source: linux/fuse.h, protocol 7.31 and later (a request's header is the same since 7.0). All in the machine's own byte
order; a message is one read or one write of `/dev/fuse`.
"""

from __future__ import annotations

import struct

IN_HEADER = struct.Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""

READ_IN = struct.Struct("=QQIIQII")
"""fh, offset, size, read_flags, lock_owner, flags, padding."""

WRITE_IN = struct.Struct("=QQIIQII")
"""fh, offset, size, write_flags, lock_owner, flags, padding; the bytes follow."""

WRITE_OUT = struct.Struct("=IiQII")
"""An answer's header, then size and padding."""

INTERRUPT_IN = struct.Struct("=Q")
"""unique of the interrupted request."""

OUT_HEADER = struct.Struct("=IiQ")
"""len, error (0 or a negative errno), unique."""

OPEN_OUT = struct.Struct("=IiQQII")
"""An answer's header, then fh, open_flags, padding."""

OPEN = 14
READ = 15
WRITE = 16
INIT = 26
INTERRUPT = 36

IN_BYTES = IN_HEADER.size
OUT_BYTES = OUT_HEADER.size
READ_IN_AT = IN_BYTES
WRITE_DATA_AT = IN_BYTES + WRITE_IN.size

MAX_WRITE_BYTES = 1 << 20
"""libfuse's own bound: the largest WRITE that its answer to INIT allows."""

REQUEST_BYTES = MAX_WRITE_BYTES + 4096
"""A buffer for any request; the kernel gives none to a reader with less room than for the largest WRITE."""

_KEEP_CACHE, _NO_FLUSH = 1 << 1, 1 << 5
"""FOPEN_KEEP_CACHE; FOPEN_NOFLUSH (Linux 5.16): closing it stores nothing, and waits for nobody."""

_INIT_FLAGS_AT = IN_BYTES + 12
_SPLICE_FLAGS = 0b111 << 7
"""SPLICE_WRITE, SPLICE_MOVE, SPLICE_READ."""


def without_splice(init: bytes) -> bytes:
    """An INIT request whose receiver will not want to splice: it is offered a socket, not `/dev/fuse`."""
    (flags,) = struct.unpack_from("=I", init, _INIT_FLAGS_AT)
    return init[:_INIT_FLAGS_AT] + struct.pack("=I", flags & ~_SPLICE_FLAGS) + init[_INIT_FLAGS_AT + 4 :]


def answer_head(unique: int, length: int) -> bytes:
    """What stands before `length` bytes that were read."""
    return OUT_HEADER.pack(OUT_BYTES + length, 0, unique)


def error_answer(unique: int, number: int) -> bytes:
    """The whole answer of a request that failed with errno `number`."""
    return OUT_HEADER.pack(OUT_BYTES, -number, unique)


def open_answer(unique: int, handle: int) -> bytes:
    """The whole answer of an OPEN whose file only reads, and whose close must not wait for us."""
    return OPEN_OUT.pack(OPEN_OUT.size, 0, unique, handle, _KEEP_CACHE | _NO_FLUSH, 0)


def write_answer(unique: int, size: int) -> bytes:
    """The whole answer of a WRITE of which `size` bytes are stored."""
    return WRITE_OUT.pack(WRITE_OUT.size, 0, unique, size, 0)
