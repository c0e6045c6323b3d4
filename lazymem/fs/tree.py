"""What the mount looks like: names, inode numbers, sizes, modes. Pure; knows nothing of FUSE's library.

Inode numbers are fixed, sizes and times are constant for the mount's life (rule 11): a moving mtime would make the
kernel drop the whole page cache, that is, the guest's resident RAM.
"""

from __future__ import annotations

import stat
from collections.abc import Callable

from msgspec import Struct

ROOT_INODE = 1
RAM_INODE = 2
RAM_NAME = "pc.ram"
MANIFEST_INODE = 3
VMSTATE_INODE = 4
DIGESTS_INODE = 5
DIGESTS_NAME = ".pc.ram.digests"
WRITTEN_INODE = 6
WRITTEN_NAME = ".pc.ram.written"

FOREVER_SECONDS = 86400.0 * 365
"""How long the kernel may believe a name or an attribute: both never change."""


class Node(Struct, frozen=True):
    """One file or folder. `size` in bytes; `fleeting`: may vanish, so the kernel must ask for the name each time."""

    inode: int
    name: bytes
    mode: int
    size: int
    fleeting: bool = False

    @property
    def name_seconds(self) -> float:
        return 0.0 if self.fleeting else FOREVER_SECONDS


class Tree:
    """The root with `pc.ram` (read-write), and read-only `manifest.json` and `vmstate` where the snapshot has them.

    Two more are there for who asks by name, and in no listing, since they are of no use beside a copy of the others:
    the snapshot's digest tree (`digests_bytes`, if not 0), and which pages this run wrote (`written_bytes`, one each).

    `has_writes` is asked at each look-up: a run that has written no longer offers `vmstate`, which belongs to the RAM
    as it was (rule 6).
    """

    def __init__(
        self,
        *,
        ram_bytes: int,
        manifest_bytes: int,
        vmstate_bytes: int,
        has_writes: Callable[[], bool],
        others: bool = False,
        writable: bool = True,
        digests_bytes: int = 0,
        written_bytes: int = 0,
    ) -> None:
        self._has_writes = has_writes
        read, write = (0o444, 0o222) if others else (0o400, 0o200)
        self.root = Node(ROOT_INODE, b"", stat.S_IFDIR | (0o755 if others else 0o700), 0)
        self.ram = Node(RAM_INODE, RAM_NAME.encode(), stat.S_IFREG | read | (write if writable else 0), ram_bytes)
        files = [self.ram]
        if manifest_bytes:
            files.append(Node(MANIFEST_INODE, b"manifest.json", stat.S_IFREG | read, manifest_bytes))
        if vmstate_bytes:
            files.append(Node(VMSTATE_INODE, b"vmstate", stat.S_IFREG | read, vmstate_bytes, fleeting=True))
        self._files = tuple(files)
        told = ((DIGESTS_INODE, DIGESTS_NAME, digests_bytes), (WRITTEN_INODE, WRITTEN_NAME, written_bytes))
        self._unlisted = tuple(
            Node(inode, name.encode(), stat.S_IFREG | read, size) for inode, name, size in told if size
        )
        self._by_inode = {node.inode: node for node in (self.root, *files, *self._unlisted)}

    def children(self) -> tuple[Node, ...]:
        """The root's files, as offered now."""
        if self._has_writes():
            return tuple(node for node in self._files if not node.fleeting)
        return self._files

    def maybe_child(self, parent: int, name: bytes) -> Node | None:
        """The file of that name in folder `parent`, if it is offered now."""
        if parent != ROOT_INODE:
            return None
        return next((node for node in (*self.children(), *self._unlisted) if node.name == name), None)

    def maybe_node(self, inode: int) -> Node | None:
        """The node with that number, offered or not: an open file stays readable."""
        return self._by_inode.get(inode)
