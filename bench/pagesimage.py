"""A `pages` guest's snapshot to resume in lazymem-vm: all of its RAM is filled. Made once and kept."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from bench.images import FORMAT, Image, image_of_guest
from lazymem.cli.progress import Reporter
from lazymem.demo.vmrun import VmGuest, started
from lazymem.vm.guests import build_guest
from lazymem.vm.taking import Options, take_snapshot

GUEST_SECONDS = 300.0
"""For one of its commands."""


def pages_image(work: Path, ram_bytes: int) -> Image:
    """The snapshot; filling takes a second for some 10 MiB."""
    return image_of_guest(work / f"pages-{ram_bytes >> 20}-v{FORMAT}", partial(_fill_and_save, ram_bytes))


def _fill_and_save(ram_bytes: int, sockets: Path, near: Path) -> Path:
    ram = near / "ram"
    ram.touch()
    os.truncate(ram, ram_bytes)
    guest = VmGuest(ram, ram_bytes, sockets / "q", sockets / "s", build_guest("pages", near))
    with started(guest, sockets / "log") as vm:
        with vm.open_monitor() as qmp:
            qmp.command("cont")
        vm.serial.expect("ready")
        vm.serial.ask("fill 1", "filled", GUEST_SECONDS)
        take_snapshot(Options(vm.monitor, near / "snapshot"), Reporter())
    return near / "snapshot"
