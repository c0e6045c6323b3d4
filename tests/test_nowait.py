"""Reading without waiting for a disk, on a disk and in memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from lazymem import nowait
from lazymem.nowait import nowait_flags
from lazymem.store.pagefile import PageFile


def flags(folder: str | Path) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return nowait_flags(file.fileno())


def test_a_disk_is_told_not_to_wait_and_memory_does_not_know_how(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flags("/dev/shm") == 0
    assert flags(Path(__file__).parent) in (0, os.RWF_NOWAIT)
    monkeypatch.setattr(nowait, "_MOUNTINFO", "/nonexistent")
    assert flags("/dev/shm") == os.RWF_NOWAIT


def test_a_file_of_which_nothing_can_be_told_is_on_a_disk() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        number = file.fileno()
        assert nowait.is_in_memory(number)
    assert not nowait.is_in_memory(number), "it is closed"


async def test_pages_in_memory_are_at_hand() -> None:
    """A cache on tmpfs is read at once, and not through a thread; so is /tmp where it is one."""
    with tempfile.TemporaryFile(dir="/dev/shm") as memory:
        file = PageFile(os.dup(memory.fileno()), "memory")
        try:
            await file.write(0, b"x" * 8192)
            assert file.maybe_read_nowait(0, 8192) == b"x" * 8192
        finally:
            file.close()
