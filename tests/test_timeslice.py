"""Short slices are the kernel's to give: what it says of a thread that asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem import timeslice
from lazymem.fs import checks

SCHED = Path("/proc/self/sched")

ASK = """
import ctypes, os, sys, threading
from lazymem import timeslice
# Whoever runs the tests may have short slices already, which children inherit: begin with the kernel's own.
own = timeslice._SCHED_ATTR.pack(timeslice._SCHED_ATTR.size, 0, 0, os.nice(0), 0, 0, 0, 0)
ctypes.CDLL(None).syscall(timeslice._SYS_SCHED_SETATTR, 0, ctypes.c_char_p(own), 0)
if sys.argv[1:]:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.nice(3)
print(timeslice.ask_for_short_slices())
print(os.sched_getscheduler(0), os.nice(0))
seen = []
thread = threading.Thread(target=lambda: seen.append(open("/proc/thread-self/sched").read()))
thread.start(); thread.join()
print(seen[0])
"""


def _asked(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", ASK, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _slice_ns(lines: list[str]) -> int | None:
    """None: a kernel that gives none (before 6.12; 6.6 shows its own), or does not show them."""
    if checks.kernel_version(os.uname().release) < (6, 12):
        return None
    found = re.search(r"^se\.slice\s*:\s*(\d+)$", "\n".join(lines), re.MULTILINE)
    return int(found[1]) if found else None


def test_it_and_its_threads_get_them() -> None:
    agreed, state, *sched = _asked()
    assert (agreed, state) == ("True", f"{os.SCHED_OTHER} {os.nice(0) + 3}")
    assert _slice_ns(sched) in (round(timeslice.SHORTEST_SECONDS * 1e9), None)


def test_another_policy_stays() -> None:
    agreed, state, *sched = _asked("batch")
    assert (agreed, state.split()[0]) == ("False", str(os.SCHED_BATCH))
    assert _slice_ns(sched) != round(timeslice.SHORTEST_SECONDS * 1e9)


def test_whoever_has_them_already_does_not_spoil_these_tests() -> None:
    """As a test that ran before in the same process may."""
    again = "import subprocess, sys; from lazymem import timeslice; timeslice.ask_for_short_slices()\n"
    again += "subprocess.run([sys.executable, '-c', sys.argv[1], 'batch'], check=True)"
    done = subprocess.run([sys.executable, "-c", again, ASK], capture_output=True, text=True, check=True)
    assert _slice_ns(done.stdout.splitlines()) != round(timeslice.SHORTEST_SECONDS * 1e9)


def test_a_refusal_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeslice, "_SYS_SCHED_SETATTR", 100000)
    assert not timeslice.ask_for_short_slices()
