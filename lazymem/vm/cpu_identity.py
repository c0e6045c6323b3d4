"""What CPUID says: the library's own answers without what it cannot do, or does in a way that a machine must not.

Masked: AVX and FMA (invalid opcodes in the library whatever CPUID says), XSAVE (no extended state is saved), RDRAND
(its numbers come from the host, so no run would repeat), MONITOR, the local APIC and x2APIC (there is none), SYSENTER
and SYSCALL (the library executes them as no-operations), RDTSCP (it may read the host's time: see `cpu_engine`).
"""

from __future__ import annotations

import functools

from lazymem.vm.cpu_engine import Leaf, unmasked_cpuid

_ECX_1 = sum(1 << bit for bit in (3, 12, 21, 24, 26, 27, 28, 29, 30))
_EDX_1 = sum(1 << bit for bit in (9, 11))
_EDX_8000_0001 = sum(1 << bit for bit in (11, 27))
_XSAVE_LEAF = 0xD


@functools.lru_cache(maxsize=256)
def cpuid(leaf: int, subleaf: int) -> Leaf:
    """The masked answer for EAX = `leaf`, ECX = `subleaf`; the same in every machine of one library version."""
    eax, ebx, ecx, edx = unmasked_cpuid(leaf, subleaf)
    if leaf == 1:
        return eax, ebx, ecx & ~_ECX_1, edx & ~_EDX_1
    if leaf == 0x8000_0001:
        return eax, ebx, ecx, edx & ~_EDX_8000_0001
    if leaf == _XSAVE_LEAF:
        return 0, 0, 0, 0
    return eax, ebx, ecx, edx
