"""A disk without room, a host without threads: failures that somebody can put right while the guest waits."""

from __future__ import annotations

import errno

from lazymem.errors import StoreError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)
"""EAGAIN is `pagefile`'s for a thread that could not be started."""


def is_full(error: StoreError) -> bool:
    """Whether the disk, or the user's share of it, has no room, or the host no thread."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL
