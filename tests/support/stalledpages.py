"""Memory whose pages do not come until a test lets them: as on a mount whose server is away.

A file on a real FUSE mount, mapped over the memory: its READs wait. The mount's daemon (`stalledmount`) is a process of
its own, since a fault stops the thread that stands on it. userfaultfd(2) would do without a mount, but many hosts and
containers deny it, and only faults of user code may stall there.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from lazymem.pages import PAGE_SIZE

_MAP_FIXED = 0x10
_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE
_LINE_BYTES = 1 << 16

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class StalledPages:
    """`pages` pages from the page-aligned host `address` on lose their bytes and stall until `release`.

    At the end of the `with` they are ordinary memory again, all zero.
    """

    def __init__(self, address: int, pages: int) -> None:
        self._start, self._pages = address, pages
        self._touched: list[int] = []
        self._unread = b""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazymem-stalled-")))
            self._daemon = stack.enter_context(_daemon(folder, pages))
            assert self._read_line() == b"ready", "the mount did not come"
            file = os.open(folder / "pages", os.O_RDONLY)
            try:
                self._map(mmap.MAP_PRIVATE, file)
            finally:
                os.close(file)
            # Else the kernel asks for the pages around as well.
            assert libc.madvise(address, pages * PAGE_SIZE, mmap.MADV_RANDOM) == 0
            stack.callback(self._map, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            stack.callback(self.release)
            self._stack = stack.pop_all()

    def __enter__(self) -> StalledPages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Releases, so whoever waits goes on; then the memory is no more the mount's; then the mount goes.
        self._stack.close()

    def wait_touched(self, timeout_seconds: float = 60) -> None:
        """Until somebody stands on one of the pages."""
        while not self._touched:
            self._touched.append(int(self._read_line(timeout_seconds)))

    def let_next(self) -> int:
        """Wait until somebody stands on a page, and let that one come, all zero; its number, from 0."""
        self.wait_touched()
        page = self._touched.pop(0)
        self._say(page)
        return page

    def release(self) -> None:
        """The pages come, all zero, now and from now on."""
        self._say("all")

    def _map(self, flags: int, file: int) -> None:
        where = libc.mmap(self._start, self._pages * PAGE_SIZE, _PROTECTION, flags | _MAP_FIXED, file, 0)
        assert where == self._start, os.strerror(ctypes.get_errno())

    def _say(self, word: object) -> None:
        assert self._daemon.stdin is not None
        self._daemon.stdin.write(f"{word}\n".encode())
        self._daemon.stdin.flush()

    def _read_line(self, timeout_seconds: float = 60) -> bytes:
        """Not readline(): that cannot give up."""
        assert self._daemon.stdout is not None
        while b"\n" not in self._unread:
            if not select.select([self._daemon.stdout], [], [], timeout_seconds)[0]:
                raise TimeoutError("nobody touched a page")
            data = os.read(self._daemon.stdout.fileno(), _LINE_BYTES)
            assert data, f"the stalled mount's daemon ended with {self._daemon.wait()}"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line


@contextlib.contextmanager
def _daemon(folder: Path, pages: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.support.stalledmount", str(folder), str(pages)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            # The end of its input ends it, and its mount with it.
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
