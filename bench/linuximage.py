"""A Linux guest's snapshot to resume: 512 MiB, 160 MiB of them a file in its tmpfs. Booted once and kept."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from bench.images import FORMAT, Image, adopt
from lazymem.cli.progress import Reporter
from lazymem.demo import cpio, linuxguest
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


def _guest(folder: Path) -> linuxguest.LinuxGuest:
    """The demo's, but for its `read`: busybox's head takes a byte at a time, and under emulation that would be all
    that is measured.
    """
    built = linuxguest.build(folder, random_mib=RANDOM_MIB, text_mib=TEXT_MIB)
    init = linuxguest.INIT.replace(
        "head -c $((argument * 1048576)) /tmp/data", "dd if=/tmp/data bs=1M count=$argument 2>/dev/null"
    )
    if init != linuxguest.INIT:
        entries = [cpio.folder(name) for name in ("bin", "dev", "proc", "sys", "tmp")]
        busybox = linuxguest.find_busybox().read_bytes()
        entries += [cpio.program("bin/busybox", busybox), cpio.program("init", init.encode())]
        built.initrd.write_bytes(cpio.archive(entries))
    return built


def _boot_and_save(sockets: Path, near: Path, folder: Path) -> None:
    guest = _guest(sockets)
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
