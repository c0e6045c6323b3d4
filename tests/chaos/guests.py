"""A Linux guest in QEMU that checks its memory, over and over, while its RAM's mount is ill-treated."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazymem.cli import snapshot
from lazymem.demo.qemurun import Qemu
from lazymem.errors import LazymemError
from tests.chaos.report import Report
from tests.support.mounts import Mounted
from tests.support.qemu import booted, resumed

PATIENCE_SECONDS = 180.0
"""For one answer: what stalls it is over long before."""


@dataclass(frozen=True)
class SavedGuest:
    """A snapshot of it, and the checksum of its file."""

    folder: Path
    checksum: str


def save_guest(folder: Path) -> SavedGuest:
    """Boots one and takes a snapshot of it."""
    with booted(folder) as guest:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            if snapshot.main([str(guest.qemu.monitor), str(folder / "guest")]):
                raise SystemExit(f"no snapshot of the guest could be taken: {said.getvalue()}")
        guest.qemu.process.wait(60)
        return SavedGuest(folder / "guest", guest.checksum)


class CheckingGuest:
    """Asks it in a thread of its own; what is wrong goes into `report`."""

    def __init__(self, qemu: Qemu, checksum: str, report: Report) -> None:
        self._qemu = qemu
        self._expected = checksum
        self._report = report
        self._over = threading.Event()
        self.checks = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def is_well(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._check()
        except LazymemError as error:
            self._report.problems.append(f"the guest is gone: {error} (QEMU: {self._qemu.process.poll()})")

    def _check(self) -> None:
        serial = self._qemu.serial
        started_at = time.monotonic()
        serial.ask("tick", "tick", PATIENCE_SECONDS)
        self._report.stalled(time.monotonic() - started_at, "a line of the guest")
        found = serial.ask("sum", "sum", PATIENCE_SECONDS)
        self.checks += 1
        if found != self._expected:
            self._report.bytes_wrong += 1
            self._report.problems.append(f"the guest's memory has changed: {found} instead of {self._expected}")
        self._expected = serial.ask(f"write line {self.checks}", "written", PATIENCE_SECONDS)


@contextmanager
def checking(mounted: Mounted, saved: SavedGuest, log: Path, report: Report) -> Iterator[CheckingGuest]:
    """It runs off the mount, from the saved state on."""
    with resumed(mounted.ram_path, mounted.path / "vmstate", log) as qemu:
        guest = CheckingGuest(qemu, saved.checksum, report)
        try:
            yield guest
        finally:
            guest.stop()
            report.guest_checks += guest.checks
