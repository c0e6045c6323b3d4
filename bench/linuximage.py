"""A Linux guest's snapshot to resume: 512 MiB, 160 MiB of them a file in its tmpfs. Booted once and kept.

One has a screen, too, and a program that writes it once it is told to (`draw`, what it draws: `draw.S`).
"""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

from bench.images import FORMAT, Image, image_of_guest
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


SCREEN = ("-vga", "std")
"""QEMU's options for it: 16 MiB, of which 3 are written."""

_SCREENS = "-screens2"
"""Part of the kept image's name: another one when `draw.S` changes."""

_DRAW = """        draw) for device in /sys/bus/pci/devices/*; do
                  case $(cat $device/class) in 0x03*) screen=$device/resource0;; esac
              done
              if [ $argument = once ]; then draw $screen once
              else draw $screen $argument & sleep 1; kill -0 $!; fi && echo "draw $screen";;
        *)"""


def linux_image(work: Path, *, screen: bool = False) -> Image:
    """The snapshot; booting it the first time takes half a minute under emulation."""
    folder = work / f"linux{_SCREENS if screen else ''}-{RAM_BYTES >> 20}-v{FORMAT}"
    return image_of_guest(folder, partial(_boot_and_save, screen))


def build_guest(
    folder: Path, *, screen: bool, random_mib: int = RANDOM_MIB, text_mib: int = TEXT_MIB
) -> linuxguest.LinuxGuest:
    """The demo's, but for its `read`: busybox's head takes a byte at a time, and under emulation that would be all
    that is measured.
    """
    built = linuxguest.build(folder, random_mib=random_mib, text_mib=text_mib)
    init = linuxguest.INIT.replace(
        "head -c $((argument * 1048576)) /tmp/data", "dd if=/tmp/data bs=1M count=$argument 2>/dev/null"
    )
    programs = []
    if screen:
        init = init.replace("        *)", _DRAW)
        programs = [cpio.program("bin/draw", assembled(folder))]
    if init != linuxguest.INIT:
        entries = [cpio.folder(name) for name in ("bin", "dev", "proc", "sys", "tmp")]
        busybox = linuxguest.find_busybox().read_bytes()
        entries += [cpio.program("bin/busybox", busybox), cpio.program("init", init.encode()), *programs]
        built.initrd.write_bytes(cpio.archive(entries))
    return built


def assembled(folder: Path) -> bytes:
    """The program that draws, as it stands in `folder` then."""
    source, target = Path(__file__).with_name("draw.S"), folder / "draw"
    subprocess.run(["as", "--64", "-o", f"{target}.o", source], check=True)
    subprocess.run(["ld", "-static", "-nostdlib", "-o", target, f"{target}.o"], check=True)
    return target.read_bytes()


def _boot_and_save(screen: bool, sockets: Path, near: Path) -> Path:
    guest = build_guest(sockets, screen=screen)
    ram = near / "guest.ram"
    with ram.open("xb") as file:
        file.truncate(RAM_BYTES)
    options = QemuOptions(ram, RAM_BYTES, sockets / "qmp", sockets / "serial", guest, more=SCREEN * screen)
    with started(options, sockets / "log") as qemu:
        qemu.serial.expect("lazymem ready", _BOOT_SECONDS)
        qemu.serial.ask("tick", "tick")
        take_snapshot(Options(qemu.monitor, near / "snapshot"), Reporter())
    return near / "snapshot"
