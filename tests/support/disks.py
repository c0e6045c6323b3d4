"""Folders on a disk, for what the kernel's cache of a file on a disk does."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lazymem.pages import PAGE_SIZE
from tests.support.residency import cached_pages


def drops_what_is_cached(path: Path) -> bool:
    """Not so in memory, where the cache is the file. `path` is a file of one page or more."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, b"x" * PAGE_SIZE, 0)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return cached_pages(path) == 0


def maybe_place(*before: Path) -> Path | None:
    """A folder on a disk that this user may write to: of `before`, else the checkout or /var/tmp."""
    for place in (*before, Path(__file__).parents[2], Path("/var/tmp")):
        with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(prefix=".pages-", dir=place) as probe:
            probe.write(bytes(PAGE_SIZE))
            probe.flush()
            if drops_what_is_cached(Path(probe.name)):
                return place
    return None


@contextlib.contextmanager
def folder_on_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A new one: /tmp may be memory, as from Debian 13 on; the checkout or /var/tmp is not, then. Else None."""
    place = maybe_place(tmp_path)
    if place is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix=".pages-", dir=place) as folder:
        yield Path(folder)
