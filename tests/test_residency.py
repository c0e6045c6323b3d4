"""Which pages of a file are in memory, as the kernel tells it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.residency import may_ask, read_alone, resident, runs_of_ones


@pytest.mark.parametrize("folder", ["/dev/shm", None])
def test_what_was_written_is_there_and_a_hole_is_not(folder: str | None, tmp_path: Path) -> None:
    path = tmp_path / "file" if folder is None else Path(folder, f"lazymem-test-{os.getpid()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(fd, 100 * PAGE_SIZE)
        os.pwrite(fd, b"x" * PAGE_SIZE * 2, 7 * PAGE_SIZE)
        assert runs_of_ones(0, resident(fd, PageRange(0, 100))) == [PageRange(7, 2)]
        assert resident(fd, PageRange(8, 1)) == b"\1"
        assert resident(fd, PageRange(9, 91)) == bytes(91)
        assert may_ask(path)
    finally:
        os.close(fd)
        path.unlink()


def test_what_cannot_be_mapped_is_an_error() -> None:
    here, there = os.pipe()
    try:
        with pytest.raises(OSError, match="No such device"):
            resident(here, PageRange(0, 1))
    finally:
        os.close(here)
        os.close(there)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (b"", []),
        (b"\0\0", []),
        (b"\1", [PageRange(5, 1)]),
        (b"\0\1\1\0\1", [PageRange(6, 2), PageRange(9, 1)]),
        (b"\1\0\0\1\1", [PageRange(5, 1), PageRange(8, 2)]),
    ],
)
def test_runs(states: bytes, expected: list[PageRange]) -> None:
    assert runs_of_ones(5, states) == expected


def test_pages_alone_are_what_they_are(tmp_path: Path) -> None:
    """Also a hole's; and of a file that ends within them, what there is."""
    path = tmp_path / "file"
    data = os.urandom(3 * PAGE_SIZE)
    path.write_bytes(data + bytes(2 * PAGE_SIZE))
    with path.open("r+b") as file:
        file.truncate(10 * PAGE_SIZE)
        assert read_alone(file.fileno(), PageRange(1, 4)) == data[PAGE_SIZE:] + bytes(2 * PAGE_SIZE)
        assert read_alone(file.fileno(), PageRange(8, 5)) == bytes(2 * PAGE_SIZE)
        assert read_alone(file.fileno(), PageRange(20, 1)) == b""
