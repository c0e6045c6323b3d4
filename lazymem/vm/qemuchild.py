"""What a QEMU is made to be before it is one: between fork and exec.

- It ends with us: the kernel sends it SIGTERM when this process dies, however it dies.
- Its RAM gets no MADV_HUGEPAGE. QEMU asks for that on every RAM block, without an option, and it makes the kernel read
  2 MiB ahead of one touch, which on a mount whose pages come from another host is 2 MiB over the wire. A seccomp filter
  answers that one call (this advice, exactly as long as RAM) with EINVAL, as a kernel without huge pages does; QEMU
  goes on. PR_SET_THP_DISABLE does not help: the read-ahead looks at the advice alone (Linux 6.18).
- Of a template it promises to map it privately. QEMU before 8.2 opens the file for writing all the same, and of others
  who do the mount believes nothing (`fs/operations`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable
from pathlib import Path

PRIVATE_ATTRIBUTE = "user.lazymem.private"

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_SYS_SECCOMP = 317
_SET_MODE_FILTER = 1
_SPEC_ALLOW = 1 << 2
"""Older kernels slow a filtered process down against speculation attacks; a guest under TCG would pay for that."""

_AUDIT_ARCH_X86_64 = 0xC000003E
_SYS_MADVISE = 28
_MADV_HUGEPAGE = 14
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | 22  # SECCOMP_RET_ERRNO, EINVAL
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06

_ARCH, _NUMBER, _LENGTH, _ADVICE = 4, 0, 24, 32
"""Offsets in seccomp_data; arguments are 64 bits each, the low half first."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def preparation(no_huge_pages_bytes: int | None, maybe_template: Path | None = None) -> Callable[[], None]:
    """For Popen's preexec_fn, in a process without threads. None: huge pages may be (RAM is not on a mount).

    `maybe_template`: the RAM file, where it is a template's.
    """
    libc = ctypes.CDLL(None)
    parent = os.getpid()
    code = None if no_huge_pages_bytes is None or platform.machine() != "x86_64" else filter_code(no_huge_pages_bytes)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)
        if maybe_template is not None:
            with contextlib.suppress(OSError):  # then it starts all the same, only slower
                os.setxattr(maybe_template, PRIVATE_ATTRIBUTE, b"1")
        if code is not None:
            _refuse_advice(libc, code)

    return prepare


def filter_code(length_bytes: int) -> bytes:
    """The filter's instructions (struct sock_filter) for RAM of this length."""
    checks = [
        (_ARCH, _AUDIT_ARCH_X86_64),
        (_NUMBER, _SYS_MADVISE),
        (_ADVICE, _MADV_HUGEPAGE),
        (_LENGTH, length_bytes & 0xFFFFFFFF),
        (_LENGTH + 4, length_bytes >> 32),
    ]
    steps = []
    for position, (offset, value) in enumerate(checks):
        steps.append(_step(_LOAD, 0, 0, offset))
        # To the last step but one when it is something else.
        steps.append(_step(_EQUAL, 0, 2 * (len(checks) - position - 1) + 1, value))
    return b"".join([*steps, _step(_RETURN, 0, 0, _REFUSE), _step(_RETURN, 0, 0, _ALLOW)])


def _step(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _refuse_advice(libc: ctypes.CDLL, code: bytes) -> None:
    """Where the kernel has no filters, or another one forbids this one: then RAM is read ahead as it always was."""
    program = _Program(len(code) // 8, code)
    if _install(libc, program) != 0:
        # Only who may not gain rights may filter; root's CAP_SYS_ADMIN does without that.
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _install(libc, program)


def _install(libc: ctypes.CDLL, program: _Program) -> int:
    return int(libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _SPEC_ALLOW, ctypes.byref(program)))
