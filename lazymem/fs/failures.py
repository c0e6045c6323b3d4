"""What the kernel hears of our failures: an errno for each, and a line in the log."""

from __future__ import annotations

import errno
import logging

from lazymem.errors import BusyError, DeadlineError, LazymemError, StoreError, TemplateWriteError

log = logging.getLogger(__name__)


def errno_for(error: LazymemError) -> int:
    """For a reader or writer of the mount; a guest that maps the file sees any of them as SIGBUS."""
    if isinstance(error, DeadlineError):
        return errno.ETIMEDOUT
    if isinstance(error, BusyError):
        return errno.EBUSY
    if isinstance(error, TemplateWriteError):
        return errno.EROFS
    if isinstance(error, StoreError) and isinstance(error.__cause__, OSError):
        return error.__cause__.errno or errno.EIO
    return errno.EIO


def told_errno(name: str, error: Exception) -> int:
    """The errno of a request `name` that failed, after a line in the log: a bug's line has its trace."""
    if isinstance(error, LazymemError):
        log.error("%s failed: %s", name, error)
        return errno_for(error)
    log.error("%s failed: a bug in lazymem", name, exc_info=error)
    return errno.EIO
