"""What a QEMU is made to be before it is one: no huge pages for exactly its RAM, and an end when we end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys

from lazymem.vm.qemuchild import filter_code, preparation

RAM_BYTES = (4 << 30) + (2 << 20)
"""Beyond 32 bits, so that both halves of the length count."""

ADVISE = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
at = libc.mmap(None, 2 * {RAM_BYTES}, 0, 0x4022, -1, 0)
calls = (({RAM_BYTES}, 14), ({RAM_BYTES} - 4096, 14), (2 << 20, 14), ({RAM_BYTES}, 4))
print([libc.madvise(at, *call) for call in calls])
"""


def test_only_that_advice_for_only_that_length_is_refused() -> None:
    def run(length: int | None) -> str:
        words = [sys.executable, "-c", ADVISE]
        return subprocess.run(
            words, preexec_fn=preparation(length), check=True, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    assert run(None) == "[0, 0, 0, 0]"
    assert run(RAM_BYTES) == "[-1, 0, 0, 0]"


def test_every_jump_ends_at_the_last_two_steps() -> None:
    code = filter_code(RAM_BYTES)
    steps = list(struct.iter_unpack("<HBBI", code))
    for position, (kind, if_true, if_false, _) in enumerate(steps):
        if kind == 0x15:
            assert if_true == 0
            assert position + 1 + if_false == len(steps) - 1
    assert [step[3] for step in steps[-2:]] == [0x00050016, 0x7FFF0000]


MIDDLE = """
import subprocess, sys, time
from lazymem.vm.qemuchild import preparation
child = subprocess.Popen(["sleep", "600"], preexec_fn=preparation(None))
print(child.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_when_we_are_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", MIDDLE], stdout=subprocess.PIPE, text=True) as middle:
        assert middle.stdout is not None
        child = os.pidfd_open(int(middle.stdout.readline()))
        try:
            middle.kill()
            assert select.select([child], [], [], 60)[0], "it outlived its parent"
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child, signal.SIGKILL)
            os.close(child)
