"""For daemons that a test starts with this folder in PYTHONPATH: each one dies by SIGKILL at another of its requests.

LAZYMEM_TEST_DIES names a file with two words, which request that is for the next daemon and how many daemons are still
to die, and LAZYMEM_TEST_WHERE when in that: "taken" (read from the kernel, nothing done), "unanswered" (all done, the
kernel not told) or "answered". Or "opening": when a file is opened by one of its own threads, which then stands in the
kernel, dying. Python imports a module of this name at its start.
"""

import os
import signal
import stat
import struct

FUSE_DEVICE = os.makedev(10, 229)
OPEN = 14


class _Death:
    def __init__(self, file: str, where: str) -> None:
        self._file, self._where = file, where
        self._left = -1  # not known yet

    @property
    def is_opening(self) -> bool:
        return self._where == "opening"

    def count(self, where: str, descriptor: int) -> None:
        if where != self._where or not _is_fuse(descriptor):
            return
        if self._left < 0:
            self._left = self._take()
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _take(self) -> int:
        """How many requests this daemon has; the next one has one more."""
        with open(self._file, "r+b", buffering=0) as file:
            requests, daemons = map(int, file.read().split())
            if not daemons:
                return 1 << 62
            file.seek(0)
            file.write(b"%8d %8d" % (requests + 1, daemons - 1))
        return requests


def _is_fuse(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == FUSE_DEVICE


def _is_own_open(request) -> bool:  # type: ignore[no-untyped-def]
    _, opcode, _, _, _, _, thread = struct.unpack_from("=IIQQIII", request)
    return opcode == OPEN and os.path.exists(f"/proc/self/task/{thread}")


def _install(death: _Death) -> None:
    readv, writev = os.readv, os.writev

    def dying_readv(fd, buffers):  # type: ignore[no-untyped-def]
        length = readv(fd, buffers)
        death.count("taken", fd)
        if death.is_opening and _is_fuse(fd) and _is_own_open(buffers[0]):
            death.count("opening", fd)
        return length

    def dying_writev(fd, buffers):  # type: ignore[no-untyped-def]
        death.count("unanswered", fd)
        length = writev(fd, buffers)
        death.count("answered", fd)
        return length

    os.readv, os.writev = dying_readv, dying_writev


if "LAZYMEM_TEST_DIES" in os.environ:
    _install(_Death(os.environ["LAZYMEM_TEST_DIES"], os.environ["LAZYMEM_TEST_WHERE"]))
