"""The main job from end to end on one machine, measured: boot, save, serve, mount, resume, and look at every page.

Two guests: `pages` in lazymem-vm, which checks each of its pages itself, and Linux in a stock QEMU, which compares the
checksum of a file in its memory.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazymem.demo import linuxguest, qemurun, vmrun
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.serialline import SerialLine
from lazymem.demo.serving import Mounted, mounted, served
from lazymem.demo.streamscan import scan
from lazymem.errors import GuestCrashError, MonitorError
from lazymem.pages import PAGE_SIZE
from lazymem.snapshot.manifest import RAM_BLOCK
from lazymem.vm.guests import build_guest
from lazymem.vm.qmpclient import QmpClient
from lazymem.vm.ramways import Reporter
from lazymem.vm.taking import Options, Result, take_snapshot

_LOOK_SECONDS = 0.2
"""Between two looks at how far a guest is, for the progress bar."""

_GUEST_SECONDS = 600.0
"""For a guest to fill or check its memory, on the slowest machine."""

_FILE_MIB = 32
"""The Linux guest's file: enough to be seen, and checked within seconds by an emulated CPU."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run measured. `check`: what the guest found out about its memory, in words; `good`: whether all is well.

    `start_seconds`: from the start of the destination's emulator to its guest running. `demanded_pages` came because
    the guest touched them, `ahead_pages` before it did.
    """

    guest: str
    ram_bytes: int
    ram_in_stream_bytes: int
    vmstate_bytes: int
    ram_way: str
    mount_seconds: float
    start_seconds: float
    total_pages: int
    demanded_pages: int
    ahead_pages: int
    wrong_pages: int | None
    check: str
    good: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run keeps its files. `folder` has room for some copies of the RAM, and a short path for sockets.

    `prefetch`: lazymem-mount's option, all or none.
    """

    folder: Path
    ram_bytes: int
    prefetch: str = "all"

    def new_ram_file(self) -> Path:
        path = self.folder / "source.ram"
        with path.open("xb") as file:
            file.truncate(self.ram_bytes)
        return path

    @property
    def snapshot(self) -> Path:
        return self.folder / "guest"


# --- the guest `pages` in lazymem-vm


def run_pages(place: Place, reporter: Reporter) -> Figures:
    """The whole way with lazymem-vm. Raises LazymemError where a part of it fails."""
    ram = place.new_ram_file()
    kernel = build_guest("pages", place.folder)
    sockets = place.folder / "qmp", place.folder / "serial"
    source = vmrun.VmGuest(ram, place.ram_bytes, *sockets, kernel)
    with vmrun.started(source, place.folder / "source.log") as vm:
        with vm.open_monitor() as qmp:
            qmp.command("cont")
        vm.serial.expect("ready")
        reporter.phase("pages guest fills its RAM", place.ram_bytes)
        vm.serial.tell("fill 1")
        filled = int(_await(vm.serial, "filled", reporter, lambda: ram.stat().st_blocks * 512))
        ticks = _ticks(vm.serial)
        saved = take_snapshot(Options(vm.monitor, place.snapshot), reporter)
    with _elsewhere(place, reporter) as here:
        reporter.phase("resuming from the mount")
        started = time.time()
        destination = vmrun.VmGuest(here.ram, place.ram_bytes, *sockets)
        with vmrun.started(destination, place.folder / "destination.log") as vm:
            with vm.open_monitor() as qmp:
                qmp.command("migrate-incoming", uri=f"file:{here.vmstate}")
                start_seconds = _running_at(qmp) - started
            if _ticks(vm.serial) < ticks:
                raise GuestCrashError("the guest began anew instead of going on")
            reporter.phase("the guest verifies all its pages", place.ram_bytes)
            vm.serial.tell("verify")
            answer = _await(vm.serial, "verified", reporter, lambda: here.status()["pages_held"] * PAGE_SIZE)
            status = here.status()
    verified, wrong = _verified(answer)
    return _figures(
        "pages in lazymem-vm",
        saved,
        place,
        here,
        start_seconds,
        status,
        wrong_pages=wrong,
        check=f"{verified} pages",
        good=wrong == 0 and verified == filled > 0,
    )


def _ticks(serial: SerialLine) -> int:
    """How many timer ticks the guest has counted."""
    found = re.match(r"ticks (\d+)", serial.ask("status", "status"))
    if not found:
        raise GuestCrashError("the guest's status does not begin with its ticks")
    return int(found[1])


def _verified(answer: str) -> tuple[int, int]:
    """(pages looked at, wrong ones) from "COUNT bad BAD first_bad ADDRESS"."""
    found = re.match(r"(\d+) bad (\d+) ", answer)
    if not found:
        raise GuestCrashError(f"the guest's answer to verify is {answer!r}")
    return int(found[1]), int(found[2])


# --- Linux in QEMU


def run_linux(place: Place, reporter: Reporter) -> Figures:
    """The whole way with a stock QEMU. Raises LazymemError where a part of it fails."""
    guest = linuxguest.build(place.folder, random_mib=_FILE_MIB // 2, text_mib=_FILE_MIB // 2)
    sockets = place.folder / "qmp", place.folder / "serial"
    source = QemuOptions(place.new_ram_file(), place.ram_bytes, *sockets, guest)
    with qemurun.started(source, place.folder / "source.log") as qemu:
        reporter.phase(f"Linux boots in QEMU and fills {_FILE_MIB} MiB")
        before = qemu.serial.expect("lazymem ready", _GUEST_SECONDS)
        qemu.serial.ask("tick", "tick")
        saved = take_snapshot(Options(qemu.monitor, place.snapshot), reporter)
    with _elsewhere(place, reporter) as here:
        reporter.phase("resuming from the mount")
        started = time.time()
        destination = QemuOptions(here.ram, place.ram_bytes, *sockets, incoming="defer")
        with qemurun.started(destination, place.folder / "destination.log") as qemu:
            with qemu.open_monitor() as qmp:
                qemurun.take_over(qmp, here.vmstate)
                start_seconds = _running_at(qmp) - started
            if qemu.serial.ask("tick", "tick") != "2":
                raise GuestCrashError("the guest began anew instead of going on")
            reporter.phase(f"Linux reads its {_FILE_MIB} MiB again", place.ram_bytes)
            qemu.serial.tell("sum")
            after = _await(qemu.serial, "sum", reporter, lambda: here.status()["pages_held"] * PAGE_SIZE)
            status = here.status()
    return _figures(
        "Linux in QEMU",
        saved,
        place,
        here,
        start_seconds,
        status,
        wrong_pages=None,
        check=f"{_FILE_MIB} MiB, checksum " + ("same" if after == before else "DIFFERS"),
        good=after == before,
    )


# --- what both have in common


@contextmanager
def _elsewhere(place: Place, reporter: Reporter) -> Iterator[Mounted]:
    """The snapshot served and mounted: "elsewhere" as far as the guest can tell."""
    reporter.phase("serving and mounting the snapshot")
    (place.folder / "mnt").mkdir()
    options = ("--cache", str(place.folder / "cache"), "--prefetch", place.prefetch)
    with (
        served([place.snapshot], place.folder / "serve.log") as address,
        mounted(f"{address}/guest", place.folder / "mnt", place.folder / "mount.log", *options) as here,
    ):
        yield here


def _await(serial: SerialLine, start: str, reporter: Reporter, done_bytes: Any) -> str:
    """The line that begins with `start`; meanwhile the phase advances to what `done_bytes()` says."""
    deadline = time.monotonic() + _GUEST_SECONDS
    shown = 0
    while (line := serial.maybe_line(start, _LOOK_SECONDS)) is None:
        if time.monotonic() > deadline:
            raise GuestCrashError(f"the guest did not say {start!r} within {_GUEST_SECONDS:.0f} s")
        done = done_bytes()
        reporter.advance(done - shown)
        shown = done
    return line


def _running_at(qmp: QmpClient) -> float:
    """When the resumed guest began to run (Unix time), by the emulator's own event."""
    status = qmp.wait_status(lambda state: state not in ("inmigrate", "prelaunch"))
    times = [event.seconds for event in qmp.take_events() if event.name == "RESUME"]
    if status != "running" or not times:
        raise MonitorError(f"after its state was loaded the guest is {status!r}")
    return times[-1]


def _figures(
    guest: str,
    saved: Result,
    place: Place,
    here: Mounted,
    start_seconds: float,
    status: dict[str, Any],
    *,
    wrong_pages: int | None,
    check: str,
    good: bool,
) -> Figures:
    in_stream = scan((place.snapshot / "vmstate").read_bytes()).of_block(RAM_BLOCK)
    return Figures(
        guest=guest,
        ram_bytes=saved.ram_bytes,
        ram_in_stream_bytes=in_stream,
        vmstate_bytes=saved.vmstate_bytes,
        ram_way=saved.ram_way,
        mount_seconds=here.ready_seconds,
        start_seconds=start_seconds,
        total_pages=status["pages_total"],
        demanded_pages=status["pages_demanded"],
        ahead_pages=status["pages_prefetched"],
        wrong_pages=wrong_pages,
        check=check,
        good=good and in_stream == 0,
    )
