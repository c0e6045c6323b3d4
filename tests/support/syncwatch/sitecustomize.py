"""For processes that a test starts with this folder in PYTHONPATH: what waits for a file to be on its disk is noted.

LAZYMEM_TEST_SYNCS is a file; it gets a line a call: Unix time at its begin and at its end, the call, the file's path.
Of os.fsync, os.fdatasync and mmap.flush (which names no file: "-"); lazymem has no other way to wait for a disk.
"""

import mmap
import os
import time
from collections.abc import Callable


def _note(file: str, name: str, path: str, call: Callable[[], None]) -> None:
    begun = time.time()
    try:
        call()
    finally:
        log = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.write(log, f"{begun:.6f} {time.time():.6f} {name} {path}\n".encode())
        os.close(log)


def _watch(file: str) -> None:
    def watched(name: str, real: Callable[[int], None]) -> Callable[[int], None]:
        return lambda fd: _note(file, name, os.readlink(f"/proc/self/fd/{fd}"), lambda: real(fd))

    os.fsync, os.fdatasync = watched("fsync", os.fsync), watched("fdatasync", os.fdatasync)  # type: ignore[assignment]

    class Map(mmap.mmap):
        def flush(self, *where: int) -> None:
            flush = super().flush
            _note(file, "flush", "-", lambda: flush(*where))

    mmap.mmap = Map  # type: ignore[misc]


if os.environ.get("LAZYMEM_TEST_SYNCS"):
    _watch(os.environ["LAZYMEM_TEST_SYNCS"])
