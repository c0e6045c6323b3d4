"""A full disk, a dying one, a host without threads: failures that somebody can put right while the guest waits."""

from __future__ import annotations

import errno

from lazymem.errors import StoreError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)
"""EAGAIN is `pagefile`'s for a thread that could not be started."""

_SHORT = (
    errno.ENOMEM,  # also what a control group's limit makes of a write to a file
    errno.EMFILE,
    errno.ENFILE,
)

_DYING = (
    errno.EIO,
    errno.EROFS,  # what ext4 makes of a file system whose disk failed
    errno.ENXIO,
    errno.ENODEV,
    errno.EUCLEAN,
    errno.EREMOTEIO,
    errno.ENOLINK,  # these, and the two around them, are what the kernel makes of a block device's errors
    errno.ENODATA,
    errno.EILSEQ,
    errno.EBADE,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.ENOTCONN,  # a folder below another FUSE file system
)
"""What comes from below the file system: a cable, a path to a storage server, a sector that is written anew."""


def is_full(error: StoreError) -> bool:
    """Whether the disk, or the user's share of it, has no room, or the host no thread."""
    return _errno(error) in _FULL


def is_short(error: StoreError) -> bool:
    """Whether the host, or what we may have of it, is short of something: it says nothing about what is on the disk."""
    return _errno(error) in _FULL + _SHORT


def is_out_of_room(error: StoreError) -> bool:
    """Whether less on the disk would help."""
    return _errno(error) in (errno.ENOSPC, errno.EDQUOT)


def is_mendable(error: StoreError) -> bool:
    """Whether the same may work later, when somebody made room or brought the disk back."""
    return _errno(error) in _FULL + _SHORT + _DYING


def what_to_do(error: StoreError, folder: str) -> str:
    """The end of a line for the log, for the person who reads it."""
    if _errno(error) == errno.EAGAIN:
        return "raise the limit on tasks"
    if _errno(error) in _SHORT:
        return "the mount's daemon needs more memory, or descriptors"
    if is_full(error):
        return f"make room on the disk of {folder}"
    return f"look after the disk of {folder} (dmesg says more)"


def _errno(error: StoreError) -> int | None:
    return error.__cause__.errno if isinstance(error.__cause__, OSError) else None
