"""A running QEMU of ours: started with its serial line caught, and taking a saved guest over."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazymem.demo.processes import child, open_monitor
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.serialline import SerialLine
from lazymem.errors import MonitorError
from lazymem.vm.qmpclient import QmpClient
from lazymem.vm.savestate import CAPABILITY


@dataclass(frozen=True, slots=True)
class Qemu:
    """One that runs. `monitor` is its QMP socket, which serves one client at a time."""

    process: subprocess.Popen[bytes]
    serial: SerialLine
    monitor: Path
    log: Path

    def open_monitor(self) -> QmpClient:
        return open_monitor(self.monitor, self.process, self.log)


@contextmanager
def started(options: QemuOptions, log: Path) -> Iterator[Qemu]:
    """QEMU with these options (`serial` among them); ended on the way out, its sockets removed."""
    assert options.serial is not None
    try:
        with SerialLine(options.serial) as serial, child(options.command(), log) as process:
            yield Qemu(process, serial, options.qmp, log)
    finally:
        options.serial.unlink(missing_ok=True)
        options.qmp.unlink(missing_ok=True)


def take_over(qmp: QmpClient, vmstate: Path, timeout_seconds: float = 120) -> None:
    """Gives a QEMU that was started with `-incoming defer` its device state, and waits until the guest runs.

    Raises:
        MonitorError: QEMU refused the state, or did not run in time.
    """
    qmp.command("migrate-set-capabilities", capabilities=[{"capability": CAPABILITY, "state": True}])
    # Through cat and not QEMU's own file: scheme, which 7.2 does not have.
    qmp.command("migrate-incoming", uri=f"exec:cat {shlex.quote(str(vmstate))}")
    status = qmp.wait_status(lambda state: state != "inmigrate", timeout_seconds)
    if status != "running":
        raise MonitorError(f"after its state was loaded the guest is {status!r}, not running")
