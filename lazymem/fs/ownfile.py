"""The mount's own RAM file, opened by its daemon so that an unmount succeeds all the same.

An ordinary descriptor makes `umount` fail with EBUSY. This one lies on a private copy of the mount (open_tree(2), Linux
5.2, CAP_SYS_ADMIN), which no mount table shows. The copy keeps the file system alive, and with it the unflushed rest of
an unmount: so whoever has it open looks often whether the mount is still there, and closes it when not. Blocking, and
answered by the daemon itself: never on its event loop.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select

from lazymem.fs import checks, mountinfo
from lazymem.fs.syscalls import descriptor_call
from lazymem.fs.tree import RAM_INODE, RAM_NAME

_SYS_OPEN_TREE = 428
"""The same on every architecture; libc has a name for it only since glibc 2.36."""

_AT_FDCWD = -100
_OPEN_TREE_CLONE = 1


MIN_KERNEL = (5, 16)
"""The first that can close a file without storing what its guest wrote, and so without waiting for us (FOPEN_NOFLUSH,
which `channel` answers who only reads with). Before that a daemon that is killed would wait for itself, for ever; or
for the next one, whose writes wait for this one's end (`survival`)."""


class OwnFile:
    """pc.ram of the mount `mounted`, read-only."""

    def __init__(self, mounted: mountinfo.Mount) -> None:
        """Raises OSError: not permitted, too old a kernel, or the mount is gone."""
        if checks.kernel_version(os.uname().release) < MIN_KERNEL:
            raise OSError(errno.ENOSYS, "the kernel is older than 5.16")
        self._mounted = mounted
        self._mounts = open("/proc/self/mountinfo", "rb")  # noqa: SIM115  # open until `close`
        self._changes = select.poll()
        self._changes.register(self._mounts, select.POLLPRI)
        self._tree = self._file = -1
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        path = os.fsencode(self._mounted.path)
        self._tree = descriptor_call(_SYS_OPEN_TREE, _AT_FDCWD, path, _OPEN_TREE_CLONE | os.O_CLOEXEC)
        self._file = os.open(RAM_NAME, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._tree)
        found = os.fstat(self._file)
        if f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}" != self._mounted.device or found.st_ino != RAM_INODE:
            raise FileNotFoundError(f"{self._mounted.path} is another mount by now")

    def fileno(self) -> int:
        return self._file

    def is_mounted(self) -> bool:
        """Whether the mount is still there. A system call, unless some mount came or went. Does not block."""
        if not self._changes.poll(0):
            return True
        return self._is_in_table()

    def wait_mounted(self, seconds: float, stop_fd: int) -> bool:
        """`is_mounted` after so long, or as soon as mounts change; False as soon as `stop_fd` is readable. Blocks."""
        waiting = select.poll()
        waiting.register(self._mounts, select.POLLPRI)
        waiting.register(stop_fd, select.POLLIN)
        found = [descriptor for descriptor, _ in waiting.poll(seconds * 1000)]
        if stop_fd in found:
            return False
        return not found or self._is_in_table()

    def _is_in_table(self) -> bool:
        """The id alone would not do: it is the next mount's as soon as this one is gone. The device number is not, as
        long as we have the file system open."""
        return any(
            mount.mount_id == self._mounted.mount_id and mount.device == self._mounted.device
            for mount in mountinfo.current()
        )

    def close(self) -> None:
        """After an unmount this is what ends the file system, and waits for its last requests."""
        for descriptor in (self._file, self._tree):
            if descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._file = self._tree = -1
        self._mounts.close()
