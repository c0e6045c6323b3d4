"""The Linux x86 boot protocol's 64-bit entry: setup header and boot parameters. Pure.

After Linux' Documentation/arch/x86/boot.rst and zero-page.rst. memtest86+ is loaded so; the boot parameters alone go to
ELF kernels, too, which find command line and memory map there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from msgspec import Struct

from lazymem.errors import UsageError

PARAMS_BYTES = 4096
MAX_COMMAND_LINE_BYTES = 2047
"""Without its final NUL; Linux' own limit; a kernel that names a larger one gets no more."""

_HEADER = 0x1F1
_SETUP_SECTORS, _HEADER_LENGTH, _MAGIC, _VERSION = 0x1F1, 0x201, 0x202, 0x206
_LOADER_TYPE, _LOAD_FLAGS, _COMMAND_LINE, _XLOADFLAGS, _COMMAND_LINE_LIMIT = 0x210, 0x211, 0x228, 0x236, 0x238
_E820_COUNT, _E820_TABLE, _E820_MAX = 0x1E8, 0x2D0, 128
_ENTRY_64_OFFSET = 0x200
_FIRST_VERSION_WITH_XLOADFLAGS = 0x20C
_UNDEFINED_LOADER, _LOADED_HIGH = 0xFF, 0x01


class LinuxKernel(Struct, frozen=True):
    """`code` goes to `address` and is entered `_ENTRY_64_OFFSET` bytes behind its start. `header`: the setup header."""

    address: int
    code: bytes
    header: bytes
    max_command_line_bytes: int

    @property
    def entry(self) -> int:
        return self.address + _ENTRY_64_OFFSET


def is_linux_image(image: bytes) -> bool:
    """Whether `image` has a setup header, as bzImage and memtest86+ have."""
    return image[_MAGIC : _MAGIC + 4] == b"HdrS"


def parse_linux(image: bytes, address: int) -> LinuxKernel:
    """The kernel in `image`, to be loaded at `address`.

    Raises:
        UsageError: it has no 64-bit entry, or is cut.
    """
    header_end = _MAGIC + image[_HEADER_LENGTH]
    if len(image) < max(header_end, _COMMAND_LINE_LIMIT + 4):
        raise UsageError("the kernel's setup header is cut")
    version, xloadflags = (struct.unpack_from("<H", image, at)[0] for at in (_VERSION, _XLOADFLAGS))
    if version < _FIRST_VERSION_WITH_XLOADFLAGS or not xloadflags & 1:
        raise UsageError("a kernel without the 64-bit entry of the Linux boot protocol (version 2.12)")
    # 0 stands for 4, from the times of floppy disks.
    code = image[((image[_SETUP_SECTORS] or 4) + 1) * 512 :]
    if len(code) <= _ENTRY_64_OFFSET:
        raise UsageError("the kernel is cut behind its setup part")
    limit = struct.unpack_from("<I", image, _COMMAND_LINE_LIMIT)[0]
    return LinuxKernel(address, code, image[_HEADER:header_end], min(limit, MAX_COMMAND_LINE_BYTES))


def boot_params(header: bytes, command_line_address: int, e820: Sequence[tuple[int, int, int]]) -> bytes:
    """The "zero page" that RSI points to. `header`: the kernel's own setup header, or empty for an ELF kernel."""
    params = bytearray(PARAMS_BYTES)
    # Screen: text mode 3, 80 columns, 25 rows of 16 lines, a VGA.
    params[0x06], params[0x07], params[0x0E], params[0x0F] = 3, 80, 25, 1
    struct.pack_into("<H", params, 0x10, 16)
    params[_HEADER : _HEADER + len(header)] = header
    params[_LOADER_TYPE] = _UNDEFINED_LOADER
    params[_LOAD_FLAGS] |= _LOADED_HIGH
    struct.pack_into("<I", params, _COMMAND_LINE, command_line_address)
    assert len(e820) <= _E820_MAX
    params[_E820_COUNT] = len(e820)
    for number, entry in enumerate(e820):
        struct.pack_into("<QQI", params, _E820_TABLE + 20 * number, *entry)
    return bytes(params)
