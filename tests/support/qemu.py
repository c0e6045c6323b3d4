"""Real QEMU guests for the system tests: booted, and resumed from a RAM file and a save stream."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazymem.demo.linuxguest import LinuxGuest, build
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import Qemu, started, take_over

RAM_BYTES = 256 << 20


@dataclass(slots=True)
class BootedGuest:
    """A Linux guest that has filled its file; `checksum` is what it last said of it."""

    qemu: Qemu
    guest: LinuxGuest
    ram: Path
    checksum: str


@contextmanager
def booted(folder: Path, more: tuple[str, ...] = ()) -> Iterator[BootedGuest]:
    """A guest with 256 MiB, booted to where it waits for commands; its RAM file is in `folder`."""
    ram = folder / "guest,1.ram"
    ram.touch()
    os.truncate(ram, RAM_BYTES)
    with tempfile.TemporaryDirectory(prefix="lazymem-") as sockets:
        guest = build(Path(sockets))
        options = QemuOptions(ram, RAM_BYTES, Path(sockets, "qmp"), Path(sockets, "serial"), guest, more=more)
        with started(options, folder / "qemu.log") as qemu:
            yield BootedGuest(qemu, guest, ram, qemu.serial.expect("lazymem ready", 100))


@contextmanager
def waiting(ram: Path, log: Path, *, share: bool = True) -> Iterator[Qemu]:
    """A new QEMU on the RAM file that waits for its state. It gets no kernel: all is in RAM and state."""
    with tempfile.TemporaryDirectory(prefix="lazymem-") as sockets:
        options = QemuOptions(
            ram, RAM_BYTES, Path(sockets, "qmp"), Path(sockets, "serial"), share=share, incoming="defer"
        )
        with started(options, log) as qemu:
            yield qemu


@contextmanager
def resumed(ram: Path, vmstate: Path, log: Path, *, share: bool = True) -> Iterator[Qemu]:
    """The same with its state, running."""
    with waiting(ram, log, share=share) as qemu:
        with qemu.open_monitor() as qmp:
            take_over(qmp, vmstate)
        yield qemu
