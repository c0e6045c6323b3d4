"""A full disk, a dying one, a host without threads: failures that somebody can put right while the guest waits."""

from __future__ import annotations

import errno

from lazymem.errors import StoreError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)
"""EAGAIN is `pagefile`'s for a thread that could not be started."""

_DYING = (
    errno.EIO,
    errno.EROFS,  # what ext4 makes of a file system whose disk failed
    errno.ENXIO,
    errno.ENODEV,
    errno.EUCLEAN,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.ENOTCONN,  # a folder below another FUSE file system
)
"""What comes from below the file system: a cable, a path to a storage server, a sector that is written anew."""


def is_full(error: StoreError) -> bool:
    """Whether the disk, or the user's share of it, has no room, or the host no thread."""
    return _errno(error) in _FULL


def is_out_of_room(error: StoreError) -> bool:
    """Whether less on the disk would help."""
    return _errno(error) in (errno.ENOSPC, errno.EDQUOT)


def is_mendable(error: StoreError) -> bool:
    """Whether the same may work later, when somebody made room or brought the disk back."""
    return _errno(error) in _FULL + _DYING


def what_to_do(error: StoreError, folder: str) -> str:
    """The end of a line for the log, for the person who reads it."""
    if _errno(error) == errno.EAGAIN:
        return "raise the limit on tasks"
    if is_full(error):
        return f"make room on the disk of {folder}"
    return f"look after the disk of {folder} (dmesg says more)"


def _errno(error: StoreError) -> int | None:
    return error.__cause__.errno if isinstance(error.__cause__, OSError) else None
