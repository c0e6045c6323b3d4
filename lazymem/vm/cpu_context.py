"""The inside of a saved Unicorn context: where the registers stand, and reading and changing them there.

Unicorn has no names for much of what interrupt delivery changes: the privilege level, the hidden parts of segments, the
shadow behind STI, the pending exception. They are all in the bytes that `context_save` copies, the library's private
structure. So nothing is assumed: the offsets of two landmarks are found by writing magic values, the shape between is
checked against other magic values, and a library with another shape is refused at start.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from msgspec import Struct

GPR_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
"""In the order of their numbers in instructions, which is the library's order too."""

SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr", "gdt", "idt")

_RSP = 4
_RIP = 128
_EFLAGS = 136
_HFLAGS = 176
_SEGMENTS = 184
_SEGMENT_BYTES = 24
_CR = _SEGMENTS + len(SEGMENT_NAMES) * _SEGMENT_BYTES
_DR_ERROR_CODE = -16
_DR_IS_INT = -12
_DR_BREAKPOINTS = 64
_DR_BREAKPOINTS_BYTES = 32
_DR_OLD_EXCEPTION = 96
_RETADDR_BYTES = 8

HFLAG_CPL = 3
HFLAG_INHIBIT_IRQ = 1 << 3
_HFLAG_CS32_SS32 = 3 << 4
_HFLAG_ADD_SEGMENT = 1 << 6
HFLAG_LONG_MODE = 1 << 14
_HFLAG_CS64 = 1 << 15


class ContextShape(Struct, frozen=True):
    """Byte offsets in the context: `env` of RAX, `dr0` of DR0; `size` of the whole."""

    env: int
    dr0: int
    size: int


class Segment(Struct, frozen=True):
    """A segment register with its hidden part; `flags` is the descriptor's second word."""

    selector: int
    base: int
    limit: int
    flags: int


def shape_from(context: bytes, written: Mapping[str, int]) -> ContextShape | None:
    """The shape of `context`, in which RAX, R15, RIP, CR2, DR0 and IDTR's base have the values in `written`; None if
    they do not stand to each other as this module has them."""

    def holds(at: int, value: int) -> bool:
        return context[at : at + 8] == struct.pack("<Q", value)

    env = context.find(struct.pack("<Q", written["RAX"]))
    dr0 = context.find(struct.pack("<Q", written["DR0"]))
    known = (
        holds(env + 15 * 8, written["R15"])
        and holds(env + _RIP, written["RIP"])
        and holds(env + _CR + 2 * 8, written["CR2"])
        and holds(env + _SEGMENTS + 9 * _SEGMENT_BYTES + 8, written["IDTR"])
    )
    return ContextShape(env, dr0, len(context)) if known and dr0 > env >= 0 else None


class ContextImage:
    """The bytes of a context, with names for the parts that interrupt delivery needs. Changing it changes no CPU."""

    def __init__(self, shape: ContextShape, data: bytes) -> None:
        self._shape = shape
        self.data = bytearray(data)

    def gpr(self, number: int) -> int:
        return self._read("<Q", self._shape.env + 8 * number)

    def set_gpr(self, number: int, value: int) -> None:
        self._write("<Q", self._shape.env + 8 * number, value)

    @property
    def rsp(self) -> int:
        return self.gpr(_RSP)

    @rsp.setter
    def rsp(self, value: int) -> None:
        self.set_gpr(_RSP, value)

    @property
    def rip(self) -> int:
        return self._read("<Q", self._shape.env + _RIP)

    @rip.setter
    def rip(self, value: int) -> None:
        self._write("<Q", self._shape.env + _RIP, value)

    @property
    def control_flags(self) -> int:
        """RFLAGS without the arithmetic flags and DF, which the library keeps elsewhere and computes when asked."""
        return self._read("<Q", self._shape.env + _EFLAGS)

    @control_flags.setter
    def control_flags(self, value: int) -> None:
        self._write("<Q", self._shape.env + _EFLAGS, value)

    @property
    def hidden_flags(self) -> int:
        return self._read("<I", self._shape.env + _HFLAGS)

    @hidden_flags.setter
    def hidden_flags(self, value: int) -> None:
        self._write("<I", self._shape.env + _HFLAGS, value)

    @property
    def privilege_level(self) -> int:
        return self.hidden_flags & HFLAG_CPL

    @property
    def long_mode(self) -> bool:
        return bool(self.hidden_flags & HFLAG_LONG_MODE)

    @property
    def interrupts_shadowed(self) -> bool:
        """The instruction behind STI or a load of SS has not run yet."""
        return bool(self.hidden_flags & HFLAG_INHIBIT_IRQ)

    def cr(self, number: int) -> int:
        return self._read("<Q", self._shape.env + _CR + 8 * number)

    def set_cr2(self, value: int) -> None:
        self._write("<Q", self._shape.env + _CR + 16, value)

    def segment(self, name: str) -> Segment:
        selector, base, limit, flags = struct.unpack_from("<I4xQII", self.data, self._segment_at(name))
        return Segment(selector, base, limit, flags)

    def set_segment(self, name: str, segment: Segment) -> None:
        at = self._segment_at(name)
        struct.pack_into("<I4xQII", self.data, at, segment.selector, segment.base, segment.limit, segment.flags)

    def enter_64_bit(self, privilege_level: int) -> None:
        """The hidden flags after a 64-bit code segment was loaded: level, mode, and no interrupt shadow."""
        flags = self.hidden_flags & ~(HFLAG_CPL | HFLAG_INHIBIT_IRQ | _HFLAG_ADD_SEGMENT)
        self.hidden_flags = flags | privilege_level | _HFLAG_CS32_SS32 | _HFLAG_CS64

    @property
    def error_code(self) -> int:
        """Of the exception on its way."""
        return self._read("<I", self._shape.dr0 + _DR_ERROR_CODE)

    @property
    def software_interrupt(self) -> bool:
        """The exception on its way is an INT instruction's; RIP is then already behind it."""
        return bool(self._read("<i", self._shape.dr0 + _DR_IS_INT))

    def forget_exception(self) -> None:
        """Otherwise the library takes the next fault for a double fault."""
        self._write("<i", self._shape.dr0 + _DR_OLD_EXCEPTION, -1)

    def saved(self) -> bytes:
        """The bytes to keep, without this process's pointers (the header, breakpoints, return address)."""
        data = bytearray(self.data)
        data[: self._shape.env] = bytes(self._shape.env)
        breakpoints = self._shape.dr0 + _DR_BREAKPOINTS
        data[breakpoints : breakpoints + _DR_BREAKPOINTS_BYTES] = bytes(_DR_BREAKPOINTS_BYTES)
        data[-_RETADDR_BYTES:] = bytes(_RETADDR_BYTES)
        return bytes(data)

    def take_over(self, saved: bytes) -> None:
        """Replace everything by what `saved` gave, except for this process's own pointers."""
        header, retaddr = self.data[: self._shape.env], self.data[-_RETADDR_BYTES:]
        self.data[:] = saved
        self.data[: self._shape.env] = header
        self.data[-_RETADDR_BYTES:] = retaddr

    def _segment_at(self, name: str) -> int:
        return self._shape.env + _SEGMENTS + _SEGMENT_BYTES * SEGMENT_NAMES.index(name)

    def _read(self, form: str, at: int) -> int:
        value: int = struct.unpack_from(form, self.data, at)[0]
        return value

    def _write(self, form: str, at: int, value: int) -> None:
        struct.pack_into(form, self.data, at, value)
