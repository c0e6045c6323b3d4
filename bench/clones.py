"""Guests from one template, each a lazymem-vm with share=off, and what they take of this host's memory."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazymem.demo.processes import child, open_monitor
from lazymem.demo.serialline import SerialLine

JOB_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Kind:
    """Which emulator (`engine`, as lazymem-vm names it), and a job: a line to the guest, and how its answer begins."""

    engine: str
    ram_bytes: int
    job: str
    answer: str


@dataclass(frozen=True, slots=True)
class Clone:
    """One that runs. `pids`: lazymem-vm, and the emulator, which is the same process with our own engine."""

    start_seconds: float
    pids: tuple[int, ...]


@contextmanager
def cloned(kind: Kind, number: int, ram: Path, folder: Path) -> Iterator[Clone]:
    """Guest `number` of the template that shows `ram`, which has done its job."""
    monitor, serial = folder / f"q{number}", folder / f"s{number}"
    words = [sys.executable, "-m", "lazymem.cli.vm", "-m", str(kind.ram_bytes >> 20), "-qmp", f"unix:{monitor}"]
    words += ["--pcram-file", f"{ram},share=off", "-incoming", f"file:{ram.parent}/vmstate"]
    log = folder / f"clone{number}.log"
    with ExitStack() as undo:
        line = None
        if kind.engine == "qemu":  # it connects to us, our own machine listens itself
            line = undo.enter_context(SerialLine(serial))
            words += ["--engine", "qemu", "--"]
        begun = time.perf_counter()
        process = undo.enter_context(child([*words, "-serial", f"unix:{serial}"], log))
        with open_monitor(monitor, process, log) as qmp:
            status = qmp.wait_status(lambda state: state != "inmigrate", JOB_SECONDS)
            seconds = time.perf_counter() - begun
            pids = {process.pid, qmp.peer_pid or process.pid}
        if status != "running":
            raise RuntimeError(f"guest {number} is {status!r}")
        line = line or undo.enter_context(SerialLine(serial, connect=True))
        line.ask(kind.job, kind.answer, JOB_SECONDS)
        yield Clone(seconds, tuple(pids))


def memory_of(pids: tuple[int, ...]) -> dict[str, int]:
    """Pss, and what is a process's alone, in bytes, summed over processes."""
    found = {"Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        for name in found:
            match = re.search(rf"^{name}: +(\d+) kB", text, re.MULTILINE)
            found[name] += int(match[1]) * 1024 if match else 0
    return found


def available_bytes() -> int:
    """What the kernel says that new processes could have."""
    match = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/meminfo of {os.uname().release} has no MemAvailable")
    return int(match[1]) * 1024
