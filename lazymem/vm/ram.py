"""RAM blocks: the guest's memory, each block ordinary memory or a file that is mapped.

What a file-backed block promises is the parent's table in docs (`-pcram-file`): open, stat, size exactly the block's,
map; on any error nothing is changed (never O_CREAT, never O_TRUNC) and no guest starts.

Caveat: Python that touches a missing page through a map holds the GIL while the page comes, and with it freezes the
monitor. So `read` and `write` of a backed block never touch the map from Python: a shared one goes by pread and pwrite
on the descriptor (the same page cache as the map), a private one by a C copy that ctypes runs without the GIL.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from msgspec import Struct

from lazymem.errors import BusyError, EnvironmentRefusedError, RamFileError
from lazymem.pages import PAGE_SIZE
from lazymem.snapshot.manifest import RAM_BLOCK

_MAP_NORESERVE = 0x4000
"""mmap.MAP_NORESERVE, which Python names from 3.13 on. A template's many private maps reserve nothing until written."""


class MemFile(Struct, frozen=True):
    """Which file backs which block. `share` False: mapped privately, the guest's writes reach no file."""

    block: str
    path: Path
    share: bool = True


def parse_mem_file(text: str) -> MemFile:
    """``BLOCK=FILE[,share=on|off]``, as `--mem-file` takes it.

    Raises:
        RamFileError: no block, no file, or a share that is neither on nor off.
    """
    block, equals, rest = text.partition("=")
    if not equals or not block:
        raise RamFileError(f"--mem-file takes BLOCK=FILE[,share=on|off], not {text!r}")
    return file_for_block(block, rest)


def file_for_block(block: str, text: str) -> MemFile:
    """``FILE[,share=on|off]`` for `block`. Only a last ``,share=`` is an option: other commas belong to the name."""
    path, comma, share = text.rpartition(",share=")
    if not comma:
        path, share = text, "on"
    if share not in ("on", "off"):
        raise RamFileError(f"share={share} for RAM block {block}: say share=on or share=off")
    if not path:
        raise RamFileError(f"no file named for RAM block {block}")
    return MemFile(block, Path(path), share == "on")


class RamBlock:
    """One block. `address` is the host pointer (int) that the CPU maps; `size` in bytes, a multiple of the page size.

    A block is ordinary memory, or backed by a file that this class maps, or memory at a `host` pointer that the
    caller keeps alive: never a file and a pointer at once.
    """

    def __init__(self, name: str, size: int, *, mem_file: MemFile | None = None, host: int | None = None) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"RAM block {name}: {size} bytes is not a positive multiple of {PAGE_SIZE}")
        if mem_file is not None and host is not None:
            raise ValueError(f"RAM block {name} has a host pointer and cannot also be backed by {mem_file.path}")
        self.name = name
        self.size = size
        self._file = mem_file
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._pin: ctypes.c_char | None = None
        if host is not None:
            self.address = host
            return
        if mem_file is None:
            self._map = _map_memory(name, size)
        else:
            self._fd = open_file(mem_file, size)
            try:
                self._map = _map_file(self._fd, mem_file, size)
            except BaseException:
                os.close(self._fd)
                raise
        self._pin = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._pin)

    @property
    def backed(self) -> bool:
        """A file maps this block."""
        return self._file is not None

    @property
    def share(self) -> bool:
        """The guest's writes reach the file."""
        return self._file is not None and self._file.share

    @property
    def do_not_save(self) -> bool:
        """The file is this block's saved state, so its pages are never in a save stream.

        Not so for a private map: its written pages are in no file, so a save has to carry it.
        """
        return self.share

    @property
    def path(self) -> Path | None:
        """The backing file."""
        return None if self._file is None else self._file.path

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on. May wait for a page of a mount, without the GIL.

        Raises:
            RamFileError: the file cannot be read or became shorter.
        """
        self._check(offset, length)
        if self.share:
            return self._pread(offset, length)
        # Not string_at: that is a Python API call, which keeps the GIL while a private map's page comes.
        buffer = ctypes.create_string_buffer(length)
        ctypes.memmove(buffer, self.address + offset, length)
        return buffer.raw

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset`. May wait for a page of a mount, without the GIL.

        Raises:
            RamFileError: the file cannot be written.
        """
        self._check(offset, len(data))
        if self.share:
            self._pwrite(offset, data)
        else:
            ctypes.memmove(self.address + offset, bytes(data), len(data))

    def sync(self) -> None:
        """Everything that the guest wrote is on the file's storage when this returns. Blocks; releases the GIL.

        fsync and not msync: it writes out what was dirtied through the map just as well, and mmap.flush keeps the GIL.

        Raises:
            RamFileError: the storage failed; the file is not a whole saved state.
        """
        if not self.share:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed("sync", error) from error

    def close(self) -> None:
        """Unmap and unlock. The CPU must have let go of `address` before. Twice is harmless."""
        self._pin = None
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):  # a mount whose daemon has died; `sync` has told what that costs
                os.close(fd)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset:#x} are outside RAM block {self.name} of {self.size:#x} bytes")

    def _pread(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length:
            try:
                part = os.pread(self._fd, length, offset)
            except OSError as error:
                raise self._failed("read", error) from error
            if not part:
                raise RamFileError(f"file {self.path} of RAM block {self.name} became shorter while it was mapped")
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                done = os.pwrite(self._fd, view, offset)
            except OSError as error:
                raise self._failed("write", error) from error
            view = view[done:]
            offset += done

    def _failed(self, verb: str, error: OSError) -> RamFileError:
        return RamFileError(f"cannot {verb} {self.path} for RAM block {self.name}: {error.strerror}")


class RamBlocks(Mapping[str, RamBlock]):
    """All blocks of a machine by name, in the machine's order."""

    def __init__(self, sizes: Sequence[tuple[str, int]], mem_files: Sequence[MemFile] = ()) -> None:
        """Allocate blocks of the (name, bytes) in `sizes`, those in `mem_files` from their files.

        Raises:
            RamFileError: a block named twice or unknown, or a file that cannot back its block.
            BusyError: somebody else's guest has the file.
        """
        files = files_by_block(mem_files, [name for name, _ in sizes])
        self._blocks: dict[str, RamBlock] = {}
        try:
            for name, size in sizes:
                self._blocks[name] = RamBlock(name, size, mem_file=files.get(name))
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> RamBlock:
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __enter__(self) -> RamBlocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def sync(self) -> None:
        """`RamBlock.sync` of each block."""
        for block in self._blocks.values():
            block.sync()

    def close(self) -> None:
        for block in self._blocks.values():
            block.close()


def files_by_block(mem_files: Sequence[MemFile], known: Sequence[str]) -> dict[str, MemFile]:
    """
    Raises:
        RamFileError: a block named twice or not among the `known`.
    """
    found: dict[str, MemFile] = {}
    for mem_file in mem_files:
        if mem_file.block in found:
            raise RamFileError(f"a file for RAM block {mem_file.block} is named twice")
        if mem_file.block not in known:
            raise RamFileError(f"there is no RAM block {mem_file.block}; this machine has {', '.join(known)}")
        found[mem_file.block] = mem_file
    return found


def open_file(mem_file: MemFile, size: int) -> int:
    """The file's descriptor, checked and locked for as long as a copy of it is open.

    Private maps are opened for reading only, so that a template that nobody may write serves.

    Raises:
        RamFileError: it cannot back the block: not to be opened, not a file, not of this size.
        BusyError: somebody else's guest has it.
    """
    where = f"{mem_file.path} for RAM block {mem_file.block}"
    try:
        # Opening a FIFO or a device has effects of its own; look before.
        if not stat.S_ISREG(os.stat(mem_file.path).st_mode):
            raise RamFileError(f"cannot open {where}: not a regular file")
        fd = os.open(mem_file.path, (os.O_RDWR if mem_file.share else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise RamFileError(f"cannot open {where}: {error.strerror}") from error
    try:
        _check_size(fd, mem_file, size)
        _lock(fd, mem_file)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_size(fd: int, mem_file: MemFile, size: int) -> None:
    try:
        file_size = os.fstat(fd).st_size
    except OSError as error:
        raise RamFileError(f"cannot stat {mem_file.path} for RAM block {mem_file.block}: {error.strerror}") from error
    if file_size != size:
        raise RamFileError(
            f"file {mem_file.path} has {file_size} bytes, but RAM block {mem_file.block} needs exactly {size}"
        )


def _lock(fd: int, mem_file: MemFile) -> None:
    """One shared writer, or many private mappers: design.md, "One writer, or a template"."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if mem_file.share else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise RamFileError(
                f"cannot lock {mem_file.path} for RAM block {mem_file.block}: {error.strerror}"
            ) from error
        raise BusyError(
            f"{mem_file.path} for RAM block {mem_file.block} is in use by another guest: "
            "one guest with share=on, or many with share=off"
        ) from error


def _map_memory(name: str, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        raise EnvironmentRefusedError(f"cannot map {size} bytes for RAM block {name}: {error.strerror}") from error


def _map_file(fd: int, mem_file: MemFile, size: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED if mem_file.share else mmap.MAP_PRIVATE | _MAP_NORESERVE
    try:
        return mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, OSError) and error.errno == errno.ENODEV:
            reason = f"its file system has no {'shared writable' if mem_file.share else 'private'} maps ({reason})"
        raise RamFileError(f"cannot map {mem_file.path} for RAM block {mem_file.block}: {reason}") from error


class Host(Struct, frozen=True):
    """What a host must be for file-backed RAM; `this_host` reads it."""

    system: str
    page_bytes: int
    byte_order: str


def this_host() -> Host:
    return Host(sys.platform, mmap.PAGESIZE, sys.byteorder)


def check_host(host: Host) -> None:
    """The parent refused hypervisors that cannot follow a host page's change; these are the checks of our hosts.

    Raises:
        EnvironmentRefusedError: with what is missing.
    """
    if host.system != "linux":
        raise EnvironmentRefusedError(f"RAM from a file needs Linux, this is {host.system}")
    if host.page_bytes != PAGE_SIZE:
        raise EnvironmentRefusedError(
            f"RAM from a file needs host pages of {PAGE_SIZE} bytes like the guest's, this host has {host.page_bytes}"
        )
    if host.byte_order != "little":
        raise EnvironmentRefusedError("RAM from a file needs a little-endian host like the guest")


def pc_ram_file(text: str) -> MemFile:
    """``FILE[,share=on|off]`` as `--pcram-file` takes it: the short form for pc.ram."""
    return file_for_block(RAM_BLOCK, text)
