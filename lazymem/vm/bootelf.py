"""An ELF64 kernel's segments: where each goes, and what of it the file holds. Pure."""

from __future__ import annotations

import struct

from msgspec import Struct

from lazymem.errors import UsageError

MAGIC = b"\x7fELF"

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_CLASS_64, _LITTLE_ENDIAN, _EXECUTABLE, _X86_64, _LOAD = 2, 1, 2, 62, 1


class Segment(Struct, frozen=True):
    """`data` goes to physical `address`; zeros follow up to `size` bytes."""

    address: int
    size: int
    data: bytes

    @property
    def end(self) -> int:
        return self.address + self.size


class ElfKernel(Struct, frozen=True):
    """`entry` is a physical address inside a segment."""

    entry: int
    segments: tuple[Segment, ...]


def parse_elf(image: bytes) -> ElfKernel:
    """The kernel in `image`, an executable for x86-64 that is linked to fixed addresses.

    Raises:
        UsageError: it is another kind of ELF file, or cut.
    """
    if len(image) < _HEADER.size:
        raise UsageError("the ELF header is cut")
    ident, kind, machine, _, entry, table, _, _, _, entry_size, count, *_ = _HEADER.unpack_from(image)
    if ident[4] != _CLASS_64:
        raise UsageError("a 32-bit ELF file; only 64-bit kernels can be started")
    if ident[5] != _LITTLE_ENDIAN or machine != _X86_64:
        raise UsageError("an ELF file for another machine than x86-64")
    if kind != _EXECUTABLE:
        raise UsageError(
            "not an ELF executable at fixed addresses (a library, an object file, or position-independent)"
        )
    if entry_size != _SEGMENT.size or table + count * entry_size > len(image):
        raise UsageError("the ELF program headers are cut")
    headers = [_SEGMENT.unpack_from(image, table + number * entry_size) for number in range(count)]
    loaded = [header for header in headers if header[0] == _LOAD and header[6]]
    if not loaded:
        raise UsageError("an ELF file without anything to load")
    segments = tuple(_segment(image, header) for header in loaded)
    return ElfKernel(_physical(entry, loaded), segments)


def _segment(image: bytes, header: tuple[int, ...]) -> Segment:
    _, _, offset, _, physical, in_file, in_memory, _ = header
    if in_file > in_memory or offset + in_file > len(image):
        raise UsageError(f"the ELF segment for {physical:#x} is cut")
    return Segment(physical, in_memory, image[offset : offset + in_file])


def _physical(entry: int, headers: list[tuple[int, ...]]) -> int:
    """Kernels name their entry by its physical address; one that names the virtual one is understood, too."""
    for at in (4, 3):
        for header in headers:
            if header[at] <= entry < header[at] + header[6]:
                return entry - header[at] + header[4]
    raise UsageError(f"the ELF entry {entry:#x} is in no loaded segment")
