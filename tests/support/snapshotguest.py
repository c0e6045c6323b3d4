"""A `pages` guest that was saved into a snapshot, and runs again from a mount of it while pages are missing."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lazymem.cli import snapshot
from lazymem.demo.vmrun import Vm, VmGuest, started
from lazymem.vm.guests import build_guest
from tests.support.mounts import Mounted, Server
from tests.support.stopping import stop


def saved(folder: Path, sockets: Path, ram_bytes: int, name: str) -> Path:
    """The snapshot `name` in `folder`, of a guest that has filled its RAM."""
    ram = folder / "source.ram"
    with ram.open("xb") as file:
        file.truncate(ram_bytes)
    guest = VmGuest(ram, ram_bytes, sockets / "q", sockets / "s", build_guest("pages", folder))
    with started(guest, folder / "log") as vm:
        with vm.open_monitor() as qmp:
            qmp.command("cont")
        vm.serial.expect("ready")
        vm.serial.ask("fill 7", "filled")
        assert snapshot.main([str(vm.monitor), str(folder / name)]) == 0
        assert vm.process.wait(60) == 0
    return folder / name


@contextlib.contextmanager
def running_on(mount: Mounted, folder: Path) -> Iterator[Vm]:
    """The guest of the snapshot that is mounted, resumed; `folder` for its sockets and its log."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        ram_bytes = mount.ram_path.stat().st_size
        with started(VmGuest(mount.ram_path, ram_bytes, place / "q", place / "s"), place / "log") as vm:
            with vm.open_monitor() as qmp:
                qmp.command("migrate-incoming", uri=f"file:{mount.path}/vmstate")
                assert qmp.wait_status(lambda status: status != "inmigrate") == "running"
            yield vm


def missing_pages(mount: Mounted) -> int:
    status = mount.status()
    return int(status["pages_total"] - status["pages_held"])


@contextlib.contextmanager
def stalled(server: Server) -> Iterator[None]:
    """It is there, and says nothing."""
    stop(server.pid)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)
