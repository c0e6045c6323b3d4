"""A folder on a disk that dies and comes back: another folder, shown by FUSE. Files fail while a flag file is there.

Run as a program with the folder, the mount point and the flag's path; it prints a line when it is mounted, and ends
when it is unmounted. Reads and writes of files get EIO then; names and sizes are still known, as by a kernel that has
them in memory.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import pyfuse3
import trio

from tests.support.mounts import wait_until


class _Shown(pyfuse3.Operations):
    supports_dot_lookup = False

    def __init__(self, source: str, flag: str) -> None:
        super().__init__()
        self._flag = flag
        self._paths = {pyfuse3.ROOT_INODE: source}

    def _below(self, parent: int, name: bytes) -> str:
        return os.path.join(self._paths[pyfuse3.InodeT(parent)], os.fsdecode(name))

    def _entry(self, path: str) -> pyfuse3.EntryAttributes:
        found = os.lstat(path)
        entry = pyfuse3.EntryAttributes()
        inode = pyfuse3.InodeT(found.st_ino)
        if path != self._paths[pyfuse3.ROOT_INODE]:
            self._paths[inode] = path
        entry.st_ino = inode
        for name in ("mode", "nlink", "uid", "gid", "size", "blocks", "atime_ns", "mtime_ns", "ctime_ns"):
            setattr(entry, f"st_{name}", getattr(found, f"st_{name}"))
        entry.attr_timeout = entry.entry_timeout = 0
        return entry

    def _refuse_if_dying(self) -> None:
        if os.path.exists(self._flag):
            raise pyfuse3.FUSEError(errno.EIO)

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        try:
            return self._entry(self._below(parent_inode, name))
        except FileNotFoundError as error:
            raise pyfuse3.FUSEError(errno.ENOENT) from error

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        return self._entry(self._paths[pyfuse3.InodeT(inode)])

    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None, ctx: object
    ) -> pyfuse3.EntryAttributes:
        path = self._paths[pyfuse3.InodeT(inode)]
        if fields.update_size:
            os.truncate(path, attr.st_size)
        if fields.update_mode:
            os.chmod(path, attr.st_mode & 0o7777)
        return self._entry(path)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: object) -> pyfuse3.EntryAttributes:
        path = self._below(parent_inode, name)
        os.mkdir(path, mode)
        return self._entry(path)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: object
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        path = self._below(parent_inode, name)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | flags & os.O_TRUNC, mode)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fd)), self._entry(path)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        fd = os.open(self._paths[pyfuse3.InodeT(inode)], os.O_RDWR | flags & os.O_TRUNC)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fd))

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self._refuse_if_dying()
        return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self._refuse_if_dying()
        return os.pwrite(fh, buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._refuse_if_dying()

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def unlink(self, parent_inode: int, name: bytes, ctx: object) -> None:
        os.unlink(self._below(parent_inode, name))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: object) -> None:
        os.rmdir(self._below(parent_inode, name))

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int, ctx: object
    ) -> None:
        new = self._below(parent_inode_new, name_new)
        os.rename(self._below(parent_inode_old, name_old), new)
        self._entry(new)

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        found = os.statvfs(self._paths[pyfuse3.ROOT_INODE])
        data = pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(found, name))
        return data

    async def opendir(self, inode: int, ctx: object) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        path = self._paths[pyfuse3.InodeT(fh)]
        for number, name in enumerate(sorted(os.listdir(path))[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self._entry(os.path.join(path, name)), number):
                break


class FailingDisk(AbstractContextManager["FailingDisk"]):
    """The new folder `folder` has it at `path`. `dying` may be set and unset."""

    def __init__(self, folder: Path) -> None:
        source, self.path, self._flag = folder / "below", folder / "disk", folder / "dying"
        source.mkdir(parents=True)
        self.path.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.failingdisk", source, self.path, self._flag],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == b"mounted\n"

    @property
    def dying(self) -> bool:
        return self._flag.exists()

    @dying.setter
    def dying(self, dying: bool) -> None:
        if dying:
            self._flag.touch()
        else:
            self._flag.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dying = False
        unmount = ["umount", str(self.path)]
        wait_until(lambda: not subprocess.run(unmount, capture_output=True, check=False).returncode, "nobody is on it")
        self._process.wait(30)
        assert self._process.stdout
        self._process.stdout.close()


async def _serve() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        print("mounted", flush=True)


def main(arguments: Sequence[str]) -> None:
    source, mountpoint, flag = arguments
    pyfuse3.init(_Shown(source, flag), mountpoint, {*pyfuse3.default_options, "fsname=failing"})
    trio.run(_serve)
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(sys.argv[1:])
