"""A kernel that is a socket pair: what `fs.channel` reads and writes as `/dev/fuse`, message by message."""

from __future__ import annotations

import socket
from typing import NamedTuple

from lazymem.fs import fuseabi
from lazymem.fs.tree import RAM_INODE, ROOT_INODE, Tree

GETATTR = 3
PATIENCE_SECONDS = 60.0


class Reply(NamedTuple):
    """`error`: 0 or a positive errno."""

    unique: int
    error: int
    data: bytes


class FakeKernel:
    """`descriptor` is the channel's. `reply` blocks: for a thread, or where an answer is known to be there."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(PATIENCE_SECONDS)
        self._unique = 0

    @property
    def descriptor(self) -> int:
        return self._theirs.fileno()

    def read(self, offset: int, size: int, thread: int = 0) -> int:
        """Ask; the request's unique. Likewise the others."""
        return self._ask(fuseabi.READ, RAM_INODE, fuseabi.READ_IN.pack(0, offset, size, 0, 0, 0, 0), thread)

    def write(self, offset: int, data: bytes) -> int:
        return self._ask(fuseabi.WRITE, RAM_INODE, fuseabi.WRITE_IN.pack(0, offset, len(data), 0, 0, 0, 0) + data)

    def interrupt(self, unique: int) -> int:
        return self._ask(fuseabi.INTERRUPT, 0, fuseabi.INTERRUPT_IN.pack(unique))

    def getattr(self) -> int:
        """What is pyfuse3's to answer."""
        return self._ask(GETATTR, ROOT_INODE, bytes(16))

    def _ask(self, opcode: int, inode: int, body: bytes, thread: int = 0) -> int:
        self._unique += 2
        head = fuseabi.IN_HEADER.pack(fuseabi.IN_BYTES + len(body), opcode, self._unique, inode, 0, 0, thread, 0, 0)
        self._ours.send(head + body)
        return self._unique

    def reply(self) -> Reply:
        """The next answer."""
        message = self._ours.recv(fuseabi.REQUEST_BYTES)
        _, error, unique = fuseabi.OUT_HEADER.unpack_from(message)
        return Reply(unique, -error, message[fuseabi.OUT_BYTES :])

    def close(self) -> None:
        """Both ends."""
        self._ours.close()
        self._theirs.close()


def tree_of(ram_bytes: int) -> Tree:
    """A mount that shows just so much RAM."""
    return Tree(ram_bytes=ram_bytes, manifest_bytes=0, vmstate_bytes=0, has_writes=lambda: False)
