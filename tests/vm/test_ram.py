"""RAM blocks: reading and writing around the map, locks, limits. The parent's rows: test_parent_table."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.errors import BusyError, EnvironmentRefusedError, RamFileError
from lazymem.vm.ram import MemFile, RamBlock, RamBlocks

SIZE = 16 * 4096


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ram"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.mark.parametrize("kind", ["ordinary", "shared", "private"])
def test_read_and_write_agree_with_the_map(kind: str, file: Path) -> None:
    mem_file = None if kind == "ordinary" else MemFile("a", file, share=kind == "shared")
    block = RamBlock("a", SIZE, mem_file=mem_file)
    model = bytearray(bytes(SIZE) if kind == "ordinary" else file.read_bytes())

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, SIZE - 1), st.binary(max_size=9000), st.booleans())
    def run(offset: int, data: bytes, by_map: bool) -> None:
        data = data[: SIZE - offset]
        if by_map:
            ctypes.memmove(block.address + offset, data, len(data))
        else:
            block.write(offset, data)
        model[offset : offset + len(data)] = data
        assert block.read(0, SIZE) == model
        assert ctypes.string_at(block.address, SIZE) == model

    run()
    block.close()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZE, 1), (0, SIZE + 1), (5, -1), (SIZE - 1, 2)])
def test_outside_of_the_block_is_refused(offset: int, length: int, file: Path) -> None:
    for mem_file in (None, MemFile("a", file), MemFile("a", file, share=False)):
        block = RamBlock("a", SIZE, mem_file=mem_file)
        with pytest.raises(ValueError, match="outside RAM block a"):
            block.read(offset, length)
        if length >= 0:
            with pytest.raises(ValueError, match="outside RAM block a"):
                block.write(offset, bytes(length))
        block.close()


@pytest.mark.parametrize("size", [0, -4096, 4095, 4097])
def test_a_size_that_is_no_pages_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        RamBlock("a", size)


def test_memory_that_the_host_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", fails)
    with pytest.raises(
        EnvironmentRefusedError, match=r"cannot map 8192 bytes for RAM block vga\.vram: Cannot allocate"
    ):
        RamBlocks([("vga.vram", 8192)])


def test_a_shared_file_has_one_guest(file: Path) -> None:
    with RamBlocks([("a", SIZE)], [MemFile("a", file)]):
        for share in (True, False):
            with pytest.raises(BusyError, match="in use by another guest"):
                RamBlocks([("a", SIZE)], [MemFile("a", file, share)])
    RamBlocks([("a", SIZE)], [MemFile("a", file)]).close()


def test_a_file_that_is_mapped_privately_has_no_writer(file: Path) -> None:
    with (
        RamBlocks([("a", SIZE)], [MemFile("a", file, share=False)]),
        pytest.raises(BusyError, match="one guest with share=on, or many with share=off"),
    ):
        RamBlocks([("a", SIZE)], [MemFile("a", file)])


def test_a_file_that_became_shorter_is_an_error_and_not_a_crash(file: Path) -> None:
    with RamBlocks([("a", SIZE)], [MemFile("a", file)]) as blocks:
        os.truncate(file, 4096)
        with pytest.raises(RamFileError, match="became shorter"):
            blocks["a"].read(0, SIZE)


def test_a_failed_sync_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    with RamBlocks([("a", SIZE)], [MemFile("a", file)]) as blocks:
        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(RamFileError, match=r"cannot sync .* for RAM block a: No space left"):
            blocks.sync()


def test_close_is_not_held_up_by_a_mount_that_died(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_close = os.close
    closed: list[int] = []

    def dead(fd: int) -> None:
        closed.append(fd)
        really_close(fd)  # Linux gives the descriptor back whatever the file system says
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    blocks = RamBlocks([("a", SIZE)], [MemFile("a", file)])
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", dead)
        blocks.close()
    assert closed, "it was told that the mount died"
    blocks.close()


def test_close_twice_is_harmless_and_frees_the_map(file: Path) -> None:
    blocks = RamBlocks([("a", SIZE)], [MemFile("a", file)])
    assert str(file) in Path("/proc/self/maps").read_text()
    blocks.close()
    blocks.close()
    assert str(file) not in Path("/proc/self/maps").read_text()


def test_blocks_keep_the_machines_order() -> None:
    with RamBlocks([("b", 4096), ("a", 8192)]) as blocks:
        assert [(name, blocks[name].size) for name in blocks] == [("b", 4096), ("a", 8192)]
        assert len(blocks) == 2


def test_the_copy_from_a_private_map_runs_without_the_gil() -> None:
    """ctypes keeps the GIL only for functions of the Python API; a copy that waits for a page must not."""
    assert not type(ctypes.memmove)._flags_ & 0x4, "FUNCFLAG_PYTHONAPI"
