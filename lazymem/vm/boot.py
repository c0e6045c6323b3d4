"""Load a kernel into guest RAM, as a firmware and boot loader would, and say how the CPU enters it.

Two kinds: an ELF64 executable at fixed physical addresses, and a file with the Linux boot protocol's 64-bit entry
(memtest86+). Both are entered in long mode with an identity map, RSI pointing to Linux boot parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lazymem.errors import UsageError
from lazymem.vm import bootelf, bootlinux, bootmemory
from lazymem.vm.bootmemory import RamRegion, Write
from lazymem.vm.startstate import StartState

_ZEROS = bytes(1 << 20)


def load_kernel(path: Path, append: str, regions: Sequence[RamRegion], write: Write) -> StartState:
    """Put the kernel at `path` and all that it needs into RAM.

    Args:
        append: its command line.
        regions: all guest RAM.
        write: writes bytes at a guest-physical address inside `regions`.

    Raises:
        UsageError: cannot read the file, not a kernel of a known kind, does not fit into RAM, command line too long.
            Nothing was written then.
    """
    try:
        image = _read_image(path, sum(region.size for region in regions))
        if image.startswith(bootelf.MAGIC):
            return _load_elf(image, append, regions, write)
        if bootlinux.is_linux_image(image):
            return _load_linux(image, append, regions, write)
        raise UsageError("not a kernel: neither an ELF64 executable nor a file with the Linux boot protocol")
    except UsageError as error:
        raise UsageError(f"-kernel {path}: {error}") from error


def _read_image(path: Path, ram_bytes: int) -> bytes:
    try:
        # A pipe or a directory has no size that could be held against RAM.
        if not path.is_file():
            raise UsageError("no such file" if not path.exists() else "not a regular file")
        if path.stat().st_size > ram_bytes:
            raise UsageError(f"larger than the guest's RAM of {ram_bytes} bytes")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read: {error.strerror}") from error


def _load_elf(image: bytes, append: str, regions: Sequence[RamRegion], write: Write) -> StartState:
    kernel = bootelf.parse_elf(image)
    command_line = _command_line(append, bootlinux.MAX_COMMAND_LINE_BYTES)
    for segment in kernel.segments:
        _check_fits(segment.address, segment.size, regions)
    for segment in kernel.segments:
        write(segment.address, segment.data)
        # RAM may be a file that was used before: what the kernel takes for zero is made zero.
        for at in range(segment.address + len(segment.data), segment.end, len(_ZEROS)):
            write(at, _ZEROS[: segment.end - at])
    return _enter(kernel.entry, b"", command_line, regions, write)


def _load_linux(image: bytes, append: str, regions: Sequence[RamRegion], write: Write) -> StartState:
    kernel = bootlinux.parse_linux(image, bootmemory.KERNEL_AREA)
    command_line = _command_line(append, kernel.max_command_line_bytes)
    _check_fits(kernel.address, len(kernel.code), regions)
    write(kernel.address, kernel.code)
    return _enter(kernel.entry, kernel.header, command_line, regions, write)


def _enter(entry: int, header: bytes, command_line: bytes, regions: Sequence[RamRegion], write: Write) -> StartState:
    e820 = bootmemory.e820_map(regions)
    write(bootmemory.BOOT_PARAMS_ADDRESS, bootlinux.boot_params(header, bootmemory.COMMAND_LINE_ADDRESS, e820))
    write(bootmemory.COMMAND_LINE_ADDRESS, command_line)
    gdt_base, gdt_limit = bootmemory.write_gdt(write)
    return StartState(
        rip=entry,
        rsp=bootmemory.STACK_TOP,
        cr3=bootmemory.write_identity_map(write, regions),
        gdt_base=gdt_base,
        gdt_limit=gdt_limit,
        rsi=bootmemory.BOOT_PARAMS_ADDRESS,
    )


def _command_line(append: str, max_bytes: int) -> bytes:
    """`append` with its final NUL."""
    encoded = append.encode(errors="surrogateescape")
    if b"\0" in encoded:
        raise UsageError("the command line contains a NUL")
    if len(encoded) > max_bytes:
        raise UsageError(f"the command line has {len(encoded)} bytes; this kernel takes at most {max_bytes}")
    return encoded + b"\0"


def _check_fits(address: int, size: int, regions: Sequence[RamRegion]) -> None:
    if address < bootmemory.KERNEL_AREA:
        raise UsageError(f"wants to be loaded at {address:#x}, below 1 MiB, where the loader's own tables are")
    if not any(region.address <= address and address + size <= region.end for region in regions):
        raise UsageError(f"does not fit into RAM: {size} bytes at {address:#x}")
