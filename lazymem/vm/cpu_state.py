"""The CPU's section in the save stream.

The registers are there by name for people and analysers; what is loaded is the library's own context, a buffer that
is private to a build of the library. It therefore travels with a checksum, the library's version and its size, and
anything else than what this process's library would have written is refused: wrong bytes would be wild pointers here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from blake3 import blake3

from lazymem.errors import SaveStreamError
from lazymem.vm.cpu_context import GPR_NAMES, SEGMENT_NAMES, ContextImage
from lazymem.vm.devicestate import Field, Layout, State, Value

_DIGEST_BYTES = 32
MTRR_MSRS = (0x2FF, 0x250, 0x258, 0x259, *range(0x268, 0x270), *range(0x200, 0x210))
"""Memory type registers: the library keeps them outside its context."""

MAX_HALT_SITES = 16
"""Addresses of HLT instructions that are watched; further ones are recognised by a rule of thumb."""

_EMPTY_SITE = (1 << 64) - 1


def layout(context_bytes: int) -> Layout:
    """The section's layout for contexts of this size."""
    eights = (*GPR_NAMES, "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer")
    fields = [Field(name, 8) for name in eights]
    for name in SEGMENT_NAMES:
        fields += [Field(f"{name}_selector", 2), Field(f"{name}_base", 8), Field(f"{name}_limit", 4)]
        fields.append(Field(f"{name}_flags", 4))
    fields += [Field("privilege_level", 1), Field("halted", 1)]
    fields.append(Field("halt_sites", 8 * MAX_HALT_SITES, buffer=True))
    fields += [Field(f"msr_{msr:03x}", 8) for msr in MTRR_MSRS]
    fields += [Field("unicorn_version", 4), Field("context_size", 4)]
    fields += [Field("context_digest", _DIGEST_BYTES, buffer=True), Field("context", context_bytes, buffer=True)]
    return Layout("cpu", 1, tuple(fields))


def named_registers(image: ContextImage, rflags: int, efer: int) -> dict[str, int]:
    """The fields that are there to be read."""
    found = {name: image.gpr(number) for number, name in enumerate(GPR_NAMES)}
    found |= {"rip": image.rip, "rflags": rflags, "efer": efer}
    found |= {f"cr{number}": image.cr(number) for number in (0, 2, 3, 4)}
    for name in SEGMENT_NAMES:
        segment = image.segment(name)
        found |= {
            f"{name}_selector": segment.selector & 0xFFFF,
            f"{name}_base": segment.base,
            f"{name}_limit": segment.limit,
            f"{name}_flags": segment.flags,
        }
    found["privilege_level"] = image.privilege_level
    return found


def context_fields(context: bytes, library_version: int) -> dict[str, Value]:
    return {
        "unicorn_version": library_version,
        "context_size": len(context),
        "context_digest": blake3(context).digest(_DIGEST_BYTES),
        "context": context,
    }


def checked_context(state: State, library_version: int, context_bytes: int) -> bytes:
    """The context in `state`, if this process's library wrote such ones.

    Raises:
        SaveStreamError: another version or size of the library, or altered bytes.
    """
    version, size = state.get("unicorn_version"), state.get("context_size")
    if version != library_version or size != context_bytes:
        raise SaveStreamError(
            f"section cpu was saved with Unicorn {_version_text(version)} and {size!r} bytes of context; this is "
            f"{_version_text(library_version)} with {context_bytes}: resume it with the version that saved it"
        )
    context = state.get("context")
    if not isinstance(context, bytes) or blake3(context).digest(_DIGEST_BYTES) != state.get("context_digest"):
        raise SaveStreamError("section cpu is altered: the context does not have its digest")
    return context


def checked_msrs(state: State) -> dict[int, int]:
    """Number to value. Raises SaveStreamError if one is missing."""
    found: dict[int, int] = {}
    for msr in MTRR_MSRS:
        value = state.get(f"msr_{msr:03x}")
        if not isinstance(value, int):
            raise SaveStreamError(f"section cpu: msr_{msr:03x} cannot be {value!r}")
        found[msr] = value
    return found


def _version_text(version: Value | None) -> str:
    if not isinstance(version, int):
        return "of an unknown version"
    return ".".join(str(version >> shift & 0xFF) for shift in (24, 16, 8))


def packed_sites(sites: Sequence[int]) -> bytes:
    """Watched addresses as the field `halt_sites`."""
    padded = [*sites, *[_EMPTY_SITE] * (MAX_HALT_SITES - len(sites))]
    return struct.pack(f">{MAX_HALT_SITES}Q", *padded)


def unpacked_sites(data: Value | None) -> list[int]:
    """Raises SaveStreamError unless `data` is what `packed_sites` gives."""
    if not isinstance(data, bytes) or len(data) != 8 * MAX_HALT_SITES:
        raise SaveStreamError("section cpu: halt_sites is not a list of addresses")
    return [site for site in struct.unpack(f">{MAX_HALT_SITES}Q", data) if site != _EMPTY_SITE]


def dump(registers: Mapping[str, int], code: bytes | None) -> str:
    """A register dump for a terminal: what a crash shows."""
    lines = [
        "  ".join(f"{name:>3}={registers[name]:016x}" for name in GPR_NAMES[row : row + 4]) for row in range(0, 16, 4)
    ]
    lines.append(f"rip={registers['rip']:016x}  rflags={registers['rflags']:08x}  cpl={registers['privilege_level']}")
    lines.append("  ".join(f"{name}={registers[name]:x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer")))
    for name in SEGMENT_NAMES:
        selector, base = registers[f"{name}_selector"], registers[f"{name}_base"]
        lines.append(f"{name:>3}={selector:04x} base={base:016x} limit={registers[f'{name}_limit']:08x}")
    lines.append("code at rip: " + (code.hex(" ") if code else "not readable"))
    return "\n".join(lines)
