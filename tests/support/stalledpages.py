"""Memory whose pages do not come until a test lets them: as on a mount whose server is away, without a mount.

userfaultfd(2); linux/userfaultfd.h has the numbers. Only faults of user code stall: a read(2) into such a page fails.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
from types import TracebackType

from lazymem.pages import PAGE_SIZE

_SYSCALL = 323
_USER_MODE_ONLY = 1
_API, _REGISTER, _ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04
_API_VERSION, _MODE_MISSING = 0xAA, 1
_MADV_DONTNEED = 4
_MESSAGE_BYTES = 32


class StalledPages:
    """`pages` pages from the page-aligned host `address` on lose their bytes and stall until `release`.

    Raises:
        OSError: this host does not allow userfaultfd.
    """

    def __init__(self, address: int, pages: int) -> None:
        self._start, self._length = address, pages * PAGE_SIZE
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.syscall(_SYSCALL, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self._fd, _API, bytearray(struct.pack("<QQQ", _API_VERSION, 0, 0)))
        registered = struct.pack("<QQQQ", address, self._length, _MODE_MISSING, 0)
        fcntl.ioctl(self._fd, _REGISTER, bytearray(registered))
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(self._length), _MADV_DONTNEED)

    def __enter__(self) -> StalledPages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing unregisters, and whoever waits goes on.
        os.close(self._fd)

    def wait_touched(self, timeout_seconds: float = 20) -> None:
        """Until somebody stands on one of the pages."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(timeout_seconds * 1000):
            raise TimeoutError("nobody touched the page")

    def let_next(self) -> int:
        """Wait until somebody stands on a page, and let that one come, all zero; its number, from 0."""
        self.wait_touched()
        address: int = struct.unpack_from("<16xQ", os.read(self._fd, _MESSAGE_BYTES))[0] & -PAGE_SIZE
        fcntl.ioctl(self._fd, _ZEROPAGE, bytearray(struct.pack("<QQQQ", address, PAGE_SIZE, 0, 0)))
        return (address - self._start) // PAGE_SIZE

    def release(self) -> None:
        """The pages are there, all zero."""
        fcntl.ioctl(self._fd, _ZEROPAGE, bytearray(struct.pack("<QQQQ", self._start, self._length, 0, 0)))
