"""A Linux guest's snapshot to resume: 512 MiB, 160 MiB of them a file in its tmpfs. Booted once and kept."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from bench.images import FORMAT, Image, adopt
from lazymem.cli.progress import Reporter
from lazymem.demo import linuxguest
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import started
from lazymem.vm.taking import Options, take_snapshot

RAM_BYTES = 512 << 20
RANDOM_MIB = 64
TEXT_MIB = 96
SMALL_MIB = 16
ALL_MIB = RANDOM_MIB + TEXT_MIB
_BOOT_SECONDS = 300.0


def linux_image(work: Path) -> Image:
    """The snapshot; booting it the first time takes half a minute under emulation."""
    folder = work / f"linux-{RAM_BYTES >> 20}-v{FORMAT}"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        # Sockets need a short path; the RAM file stands beside the snapshot, so that it can be moved there.
        with (
            tempfile.TemporaryDirectory(prefix="lazymem-bench-") as sockets,
            tempfile.TemporaryDirectory(prefix=".linux-", dir=work) as near,
        ):
            _boot_and_save(Path(sockets), Path(near), folder)
    return adopt(folder)


def _boot_and_save(sockets: Path, near: Path, folder: Path) -> None:
    guest = linuxguest.build(sockets, random_mib=RANDOM_MIB, text_mib=TEXT_MIB)
    ram = near / "guest.ram"
    with ram.open("xb") as file:
        file.truncate(RAM_BYTES)
    options = QemuOptions(ram, RAM_BYTES, sockets / "qmp", sockets / "serial", guest)
    partial = near / "snapshot"
    with started(options, sockets / "log") as qemu:
        qemu.serial.expect("lazymem ready", _BOOT_SECONDS)
        qemu.serial.ask("tick", "tick")
        take_snapshot(Options(qemu.monitor, partial), Reporter())
    shutil.move(partial, folder)
