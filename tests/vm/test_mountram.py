"""What is read of a mounted RAM file, and what is said of a read that ends early."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.errors import RamFileError
from lazymem.vm.identity import MountRun
from lazymem.vm.mountram import MountRam

RAM = bytes(range(256)) * 64


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[MountRam]:
    path = tmp_path / "pc.ram"
    path.write_bytes(RAM)
    with path.open("rb", buffering=0) as file:
        yield MountRam(path, len(RAM), MountRun("00", 0, template=False), file.fileno())


def test_a_page_that_does_not_come_is_told_as_such(ram: MountRam, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gives what it has before that page, and an error only to a read that begins with it."""
    pread = os.pread

    def failing(source: int, length: int, offset: int) -> bytes:
        if offset >= 8192:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return pread(source, min(length, 8192 - offset), offset)

    monkeypatch.setattr(os, "pread", failing)
    assert ram.read(4096, 4096) == RAM[4096:8192]
    with pytest.raises(RamFileError, match=r"through its mount .*: Connection timed out"):
        ram.read(0, len(RAM))


def test_a_read_in_pieces_and_one_beyond_the_end(ram: MountRam, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda source, length, offset: pread(source, min(length, 1000), offset))
    assert ram.read(4096, 8192) == RAM[4096:12288]
    with pytest.raises(RamFileError, match=f"ended at {len(RAM)} bytes"):
        ram.read(len(RAM) - 4096, 8192)
