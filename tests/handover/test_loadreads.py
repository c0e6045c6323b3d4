"""Which pages a load reads: those of an option ROM that is known by its signature, wherever firmware has put it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from lazymem.handover.loadreads import load_reads
from tests.support.residency import cached_pages

RAM_BYTES = 1 << 20


def _rom(blocks: int, signature: bytes = b"kvm aPiC") -> bytes:
    return (b"\x55\xaa" + bytes([blocks])).ljust(0x20, b"\xeb") + signature + b"\x90" * 100


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "pc.ram"
    path.touch()
    os.truncate(path, RAM_BYTES)
    return path


def _put(ram: Path, at: int, data: bytes) -> None:
    with ram.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("at", "blocks", "pages"),
    [
        (0xC0000, 18, [0xC0, 0xC1, 0xC2]),  # no VGA
        (0xCA800, 18, [0xCA, 0xCB, 0xCC]),  # behind SeaBIOS's VGA BIOS
        (0xCA800, 4, [0xCA]),
        (0xCF000, 8, [0xCF]),
    ],
)
def test_it_is_found_where_it_is(ram: Path, at: int, blocks: int, pages: list[int]) -> None:
    _put(ram, 0xC0000, random.Random(1).randbytes(at - 0xC0000 + 0x8000))
    _put(ram, at, _rom(blocks))
    assert load_reads(ram) == pages


@pytest.mark.parametrize(
    "data",
    [
        b"",
        _rom(18, b"another"),
        _rom(0),
        b"kvm aPiC",
        _rom(18).replace(b"\x55\xaa", b"\x55\xab"),
    ],
)
def test_nothing_is_made_of_what_is_no_such_rom(ram: Path, data: bytes) -> None:
    _put(ram, 0xCA800, data)
    assert load_reads(ram) == []


def test_of_ram_that_is_not_there_or_too_small_nothing_is_told(ram: Path) -> None:
    os.truncate(ram, 0xD0000)
    _put(ram, 0xCA800, _rom(18))
    assert load_reads(ram) == []
    assert load_reads(ram.with_name("gone")) == []


def test_nothing_is_brought_for_it(ram: Path) -> None:
    _put(ram, 0xC0000, random.Random(1).randbytes(0x30000))
    _put(ram, 0xCA800, _rom(18))
    with ram.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = cached_pages(ram)
    found = load_reads(ram)
    assert cached_pages(ram) == before
    assert found == ([] if before == 0 else [0xCA, 0xCB, 0xCC])  # a file system in memory drops nothing
