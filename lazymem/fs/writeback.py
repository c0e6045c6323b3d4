"""Keeps the kernel from writing back much at a time: a guest that writes to a page on its way to us waits for us.

The kernel hands a file system half a second's worth of dirty pages at a time, by what it believes to be its rate, which
it sets to 100 MB/s at first and measures only while much is written: 52 MiB at a time, and a guest that writes on
stands still until we have stored them. It measures whenever it is asked to write something, so it is asked often, for
a range behind the file's end, where nothing is. What it then believes is near to what it has really written lately, and
it comes with 4 to 8 MiB at a time. (`writeback_chunk_size` in fs/fs-writeback.c, `wb_update_write_bandwidth` in
mm/page-writeback.c, Linux 6.18; a kernel that does otherwise is asked in vain.)

No page is touched or waited for by it. A thread of its own, which sleeps in poll(2) on the table of mounts: its
descriptor keeps the file system alive (`ownfile`), so it has to close it as soon as the mount is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading

from lazymem.fs import mountinfo
from lazymem.fs.ownfile import OwnFile
from lazymem.fs.syscalls import system_call

log = logging.getLogger(__name__)

ASK_SECONDS = 0.3
"""The kernel measures over at least 0.2 s, and begins anew after a pause of a second."""

_SYNC_FILE_RANGE_WRITE = 2
_LENGTH_BYTES = 4096


class WritebackPace:
    """For the mount `mounted`, from `start` until it is gone, or `stop`."""

    def __init__(self, mounted: mountinfo.Mount) -> None:
        self._mounted = mounted
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="write-back", daemon=True)

    def start(self) -> None:
        """Returns at once. Where it is not permitted, nothing happens."""
        with contextlib.suppress(RuntimeError):  # no thread for us: write-back comes in larger pieces then
            self._thread.start()

    def stop(self) -> None:
        """Returns at once; the thread ends a moment later."""
        os.eventfd_write(self._stop_fd, 1)

    def _run(self) -> None:
        try:
            file = OwnFile(self._mounted)
        except OSError as error:
            log.debug("write-back comes in large pieces: %s", error)
            return
        try:
            end = os.fstat(file.fileno()).st_size
            while file.wait_mounted(ASK_SECONDS, self._stop_fd):
                system_call(
                    "sync_file_range",
                    file.fileno(),
                    ctypes.c_int64(end),
                    ctypes.c_int64(_LENGTH_BYTES),
                    _SYNC_FILE_RANGE_WRITE,
                )
        except OSError as error:
            log.debug("the kernel takes no pace of write-back: %s", error)
        finally:
            file.close()
