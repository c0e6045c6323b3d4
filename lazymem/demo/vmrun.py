"""A running lazymem-vm of ours: started paused or waiting for its state, with its serial line caught."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazymem.demo.processes import child, open_monitor
from lazymem.demo.serialline import SerialLine
from lazymem.vm.qmpclient import QmpClient


@dataclass(frozen=True, slots=True)
class VmGuest:
    """How it is started: its RAM file, its sockets (short paths), and what it runs: a kernel, or a state to come."""

    ram: Path
    ram_bytes: int
    qmp: Path
    serial: Path
    kernel: Path | None = None

    def command(self) -> list[str]:
        """With a kernel, it waits for the monitor's `cont`; without, for `migrate-incoming`."""
        parts = [sys.executable, "-m", "lazymem.cli.vm", "-m", f"{self.ram_bytes >> 20}", "--pcram-file", str(self.ram)]
        parts += ["-serial", f"unix:{self.serial}", "-qmp", f"unix:{self.qmp}"]
        return [*parts, "-kernel", str(self.kernel), "-S"] if self.kernel else [*parts, "-incoming", "defer"]


@dataclass(frozen=True, slots=True)
class Vm:
    """One that runs, its guest not yet."""

    process: subprocess.Popen[bytes]
    serial: SerialLine
    monitor: Path
    log: Path

    def open_monitor(self) -> QmpClient:
        return open_monitor(self.monitor, self.process, self.log)


@contextmanager
def started(guest: VmGuest, log: Path) -> Iterator[Vm]:
    """The emulator; ended on the way out. Its guest's first word is not lost, since it does not run yet."""
    with child(guest.command(), log) as process:
        # Its serial port listens before its monitor does.
        open_monitor(guest.qmp, process, log).close()
        with SerialLine(guest.serial, connect=True) as serial:
            yield Vm(process, serial, guest.qmp, log)
