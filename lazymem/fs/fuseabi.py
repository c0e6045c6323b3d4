"""The part of the kernel's FUSE protocol that we speak ourselves: READ, WRITE, and a session's INIT. Pure.

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

WRITE_CACHE = 1
"""Of `write_flags`: written back from the kernel's page cache, so nobody in particular waits for it."""

OPEN_IN = struct.Struct("=II")
"""flags, as in open(2); open_flags."""

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

NOTIFY_RESEND = OUT_HEADER.pack(OUT_HEADER.size, 7, 0)
"""Written by a daemon that takes a killed one's place: requests that were read and not answered come again. The highest
bit of their unique is then set, and must be in the answer too. Linux 6.9; older ones refuse it with EINVAL."""

_INIT_FLAGS_AT = IN_BYTES + 12
_SPLICE_FLAGS = 0b111 << 7
"""SPLICE_WRITE, SPLICE_MOVE, SPLICE_READ."""


def without_splice(init: bytes) -> bytes:
    """An INIT request whose receiver will not want to splice: it is offered a socket, not `/dev/fuse`."""
    (flags,) = struct.unpack_from("=I", init, _INIT_FLAGS_AT)
    return init[:_INIT_FLAGS_AT] + struct.pack("=I", flags & ~_SPLICE_FLAGS) + init[_INIT_FLAGS_AT + 4 :]


def request_unique(request: bytes) -> int:
    """The number that its answer carries."""
    unique: int = IN_HEADER.unpack_from(request)[2]
    return unique


def answered_as(answer: bytes, unique: int) -> bytes:
    """The same answer, to the request `unique`."""
    length, error, _ = OUT_HEADER.unpack_from(answer)
    return OUT_HEADER.pack(length, error, unique) + answer[OUT_BYTES:]


def answered_unique(answer: bytes | memoryview) -> int:
    """Which request an answer is for; 0: none, it is a notification."""
    unique: int = OUT_HEADER.unpack_from(answer)[2]
    return unique


def agree(one: bytes, other: bytes) -> bool:
    """Whether two answers to the same INIT say the same."""
    return one[:8] == other[:8] and one[OUT_BYTES:] == other[OUT_BYTES:]


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
