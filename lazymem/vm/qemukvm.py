"""Whether KVM runs a guest here: a small one is run, since /dev/kvm may be there and open and yet boot nothing.

Found in the field: a KVM that emulates each instruction of a kernel that is not made for it. It loads, runs firmware,
and boots no Linux in a lifetime. So the guest here is a loop in 64-bit mode with paging, a millisecond's work for a
processor, and it has to end before `_CPU_SECONDS` of this host's processor time (not of the clock: the host may be
busy) are gone. It runs in a process of its own, which a stuck KVM may keep.

Source: Documentation/virt/kvm/api.rst of the kernel; structures of arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import signal
import struct
from typing import NoReturn

DEVICE = "/dev/kvm"

_LOOPS = 1_000_000
_CPU_SECONDS = 0.1
_WAIT_SECONDS = 5.0

_CREATE_VM, _VCPU_MMAP_SIZE = 0xAE01, 0xAE04
_CREATE_VCPU, _SET_MEMORY = 0xAE41, 0x4020AE46
_GET_SREGS, _SET_SREGS, _SET_REGS, _RUN = 0x8138AE83, 0x4138AE84, 0x4090AE82, 0xAE80
_EXIT_IO = 2

_MEMORY_BYTES = 0x10000
_CODE = 0x4000
_SEGMENTS_END = 8 * 24 + 2 * 16
"""Of kvm_sregs: eight segments and two descriptor tables; the control registers follow."""


def why_not() -> str | None:
    """None: KVM runs a guest. Else the reason, as half a sentence."""
    if not os.path.exists(DEVICE):
        return f"there is no {DEVICE}"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} may not be opened by this user"
    child = os.fork()
    if child == 0:
        _be_the_probe()
    return _judge(child)


def _judge(child: int) -> str | None:
    process = os.pidfd_open(child)
    try:
        if not select.select([process], [], [], _WAIT_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            if not select.select([process], [], [], 0.1)[0]:
                return f"{DEVICE} did not let go of a guest"
    finally:
        os.close(process)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return None
    return f"{DEVICE} is there, but {'runs no guest' if code > 0 else 'hardly runs a guest (64-bit code is emulated)'}"


def _be_the_probe() -> NoReturn:
    """0: the guest came to its end. A signal's end: it used up its time."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
        os._exit(0 if _run_guest() == _EXIT_IO else 1)
    except BaseException:  # noqa: BLE001 (whatever it was: no guest ran, and this must not go on as a second lazymem-vm)
        os._exit(1)


def _run_guest() -> int:
    """The guest's reason to leave the CPU."""
    kvm = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    machine = fcntl.ioctl(kvm, _CREATE_VM, 0)
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    _fill(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(machine, _SET_MEMORY, struct.pack("<IIQQQ", 0, 0, 0, _MEMORY_BYTES, address))
    cpu = fcntl.ioctl(machine, _CREATE_VCPU, 0)
    told = mmap.mmap(cpu, fcntl.ioctl(kvm, _VCPU_MMAP_SIZE, 0))
    state = bytearray(312)
    fcntl.ioctl(cpu, _GET_SREGS, state)
    fcntl.ioctl(cpu, _SET_SREGS, _long_mode(state))
    fcntl.ioctl(cpu, _SET_REGS, struct.pack("<18Q", *([0] * 16), _CODE, 2))
    fcntl.ioctl(cpu, _RUN, 0)
    return int(struct.unpack_from("<I", told, 8)[0])


def _fill(memory: mmap.mmap) -> None:
    """Three levels of page tables that map the first 2 MiB to themselves, and the loop."""
    memory[0x1000:0x1008] = struct.pack("<Q", 0x2003)
    memory[0x2000:0x2008] = struct.pack("<Q", 0x3003)
    memory[0x3000:0x3008] = struct.pack("<Q", 0x83)
    # mov ecx, LOOPS; again: dec ecx; jnz again; out 0xf4, al
    code = b"\xb9" + struct.pack("<I", _LOOPS) + b"\xff\xc9\x75\xfc\xe6\xf4"
    memory[_CODE : _CODE + len(code)] = code


def _long_mode(state: bytearray) -> bytes:
    state[:24] = _segment(selector=8, kind=11, long=1)
    for at in range(24, 6 * 24, 24):
        state[at : at + 24] = _segment(selector=16, kind=3, long=0)
    apic_base = struct.unpack_from("<Q", state, _SEGMENTS_END + 48)[0]
    # CR0 = PG NE ET MP PE, CR2, CR3, CR4 = PAE, CR8, EFER = LMA LME
    struct.pack_into("<7Q", state, _SEGMENTS_END, 0x80000033, 0, 0x1000, 0x20, 0, 0x500, apic_base)
    return bytes(state)


def _segment(selector: int, kind: int, long: int) -> bytes:
    """kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding."""
    return struct.pack("<QIH10B", 0, 0xFFFFFFFF, selector, kind, 1, 0, 1 - long, 1, long, 1, 0, 0, 0)
