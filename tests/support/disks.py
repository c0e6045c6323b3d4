"""Folders on a disk, for what the kernel's cache of a file on a disk does."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@contextlib.contextmanager
def folder_on_disk(tmp_path: Path) -> Iterator[Path]:
    """A new one: /tmp may be memory, as from Debian 13 on; the checkout or /var/tmp is not, then. Else it skips."""
    for place in (tmp_path, Path(__file__).parents[2], Path("/var/tmp")):
        with contextlib.ExitStack() as stack:
            try:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".pages-", dir=place)))
            except PermissionError:
                continue
            probe = folder / "probe"
            probe.write_bytes(bytes(PAGE_SIZE))
            if drops_what_is_cached(probe):
                probe.unlink()
                yield folder
                return
    pytest.skip("no file system here lets go of what it caches")
