"""The daemon of `stalledpages`: mounts one file of zeros whose READs wait for a word on standard input.

It prints "ready", then the number of each page that a READ waits for. Each line of its input is the number of a page to
let come, or "all". The end of its input ends it and unmounts: whoever started it may die as it likes.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections import defaultdict

import pyfuse3
import trio

from lazymem.pages import PAGE_SIZE

NAME = b"pages"
FILE_INODE = pyfuse3.InodeT(pyfuse3.ROOT_INODE + 1)
_INPUT_BYTES = 1 << 16


class StalledFile(pyfuse3.Operations):
    """`size_bytes` zeros at the root. A page comes once it was let."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self._size_bytes = size_bytes
        self._all = trio.Event()
        self._let: defaultdict[int, trio.Event] = defaultdict(trio.Event)

    def obey(self, word: str) -> None:
        """One line of the input."""
        if word == "all":
            self._all.set()
            for event in self._let.values():
                event.set()
        else:
            self._let[int(word)].set()

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        is_file = inode == FILE_INODE
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o400 if is_file else stat.S_IFDIR | 0o500)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_size = self._size_bytes if is_file else 0
        entry.entry_timeout = entry.attr_timeout = 3600
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FILE_INODE)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode))

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        page = off // PAGE_SIZE
        if size != PAGE_SIZE:
            # Read-ahead would make the order of touches unknown; whoever sees this number fails.
            page = -1
        if not self._all.is_set():
            print(page, flush=True)
            await self._let[page].wait()
        return bytes(size)


async def serve(file: StalledFile) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        print("ready", flush=True)
        unread = b""
        commands = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
        while data := await commands.receive_some(_INPUT_BYTES):
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                file.obey(line.decode())
        file.obey("all")
        nursery.cancel_scope.cancel()


def main() -> None:
    mount_point, pages = sys.argv[1:]
    file = StalledFile(int(pages) * PAGE_SIZE)
    pyfuse3.init(file, mount_point, {"fsname=stalled", "subtype=lazymem-test"})
    try:
        trio.run(serve, file)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
