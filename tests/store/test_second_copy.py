"""Rule 12: what the guest's kernel has got does not stay in the kernel's cache of our files as well."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store.pagefile import BLOCK_PAGES, PageFile
from lazymem.store.secondcopy import merged
from tests.support import skips
from tests.support.disks import folder_on_disk
from tests.support.residency import cached_pages

PAGES = 4 * BLOCK_PAGES
PATIENCE_SECONDS = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with folder_on_disk(tmp_path) as folder:
        if folder is None:
            skips.skip_without(skips.DISK)
        found = folder / "pages"
        with open(found, "wb") as file:
            file.truncate(PAGES * PAGE_SIZE)
        yield found


def written(path: Path) -> PageFile:
    """All of it, and on the disk: only then letting go is sure to help."""
    file = PageFile(os.open(path, os.O_RDWR), str(path))
    pieces: list[tuple[int, bytes | memoryview]] = [(0, os.urandom(PAGES * PAGE_SIZE))]
    trio.run(file.write_many, pieces)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    assert cached_pages(path) == PAGES
    return file


def test_blocks_are_let_go_and_the_others_stay(path: Path) -> None:
    file = written(path)
    file.let_go(PageRange(BLOCK_PAGES, BLOCK_PAGES))
    file.let_go(PageRange(3 * BLOCK_PAGES, BLOCK_PAGES))
    give_up = time.monotonic() + PATIENCE_SECONDS
    while (left := cached_pages(path)) > 2 * BLOCK_PAGES and time.monotonic() < give_up:
        time.sleep(0.01)
    file.close()
    assert left == 2 * BLOCK_PAGES


def test_letting_go_of_a_closed_file_is_nothing(path: Path) -> None:
    file = written(path)
    file.let_go(PageRange(0, 1))
    file.close()
    file.let_go(PageRange(0, PAGES))


def test_ranges_are_merged() -> None:
    assert merged([(5, 7), (0, 2), (2, 3), (6, 9), (20, 21)]) == [(0, 3), (5, 9), (20, 21)]
    assert merged([]) == []
