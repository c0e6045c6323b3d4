"""A `pages` guest's snapshot to resume in lazymem-vm: all of its RAM is filled. Made once and kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from bench.images import FORMAT, Image, adopt
from lazymem.cli.progress import Reporter
from lazymem.demo.vmrun import VmGuest, started
from lazymem.vm.guests import build_guest
from lazymem.vm.taking import Options, take_snapshot

GUEST_SECONDS = 300.0
"""For one of its commands."""


def pages_image(work: Path, ram_bytes: int) -> Image:
    """The snapshot; filling takes a second for some 10 MiB."""
    folder = work / f"pages-{ram_bytes >> 20}-v{FORMAT}"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="lazymem-bench-") as sockets,
            tempfile.TemporaryDirectory(prefix=".pages-", dir=work) as near,
        ):
            ram = Path(near, "ram")
            ram.touch()
            os.truncate(ram, ram_bytes)
            kernel = build_guest("pages", Path(near))
            guest = VmGuest(ram, ram_bytes, Path(sockets, "q"), Path(sockets, "s"), kernel)
            with started(guest, Path(sockets, "log")) as vm:
                with vm.open_monitor() as qmp:
                    qmp.command("cont")
                vm.serial.expect("ready")
                vm.serial.ask("fill 1", "filled", GUEST_SECONDS)
                take_snapshot(Options(vm.monitor, Path(near, "snapshot")), Reporter())
            shutil.move(Path(near, "snapshot"), folder)
    return adopt(folder)
