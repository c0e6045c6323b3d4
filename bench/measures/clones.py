"""Many guests, one image: 1, 4 and 16 from one template, by time, host memory and bytes received."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.clones import Clone, Kind, available_bytes, cloned, memory_of
from bench.context import Context, Measure, Target, pairs
from bench.images import FORMAT, Image, adopt
from bench.linuximage import RAM_BYTES, SMALL_MIB, linux_image
from bench.measures.memory import page_cache_bytes
from bench.record import Sample
from bench.way import Mount
from lazymem.cli.progress import Reporter
from lazymem.demo.vmrun import VmGuest, started
from lazymem.vm.guests import build_guest
from lazymem.vm.taking import Options, take_snapshot

COUNTS = (1, 4, 16)
PAGES_RAM_BYTES = 32 << 20
_FILL_SECONDS = 300.0

_VM = Kind("unicorn", PAGES_RAM_BYTES, "verify", "verified")
_QEMU = Kind("qemu", RAM_BYTES, f"read {SMALL_MIB}", "read")


def _pages_image(work: Path) -> Image:
    """A `pages` guest that has filled its RAM; kept."""
    folder = work / f"pages-{PAGES_RAM_BYTES >> 20}-v{FORMAT}"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="lazymem-bench-") as sockets,
            tempfile.TemporaryDirectory(prefix=".pages-", dir=work) as near,
        ):
            ram = Path(near, "ram")
            ram.touch()
            os.truncate(ram, PAGES_RAM_BYTES)
            kernel = build_guest("pages", Path(near))
            guest = VmGuest(ram, PAGES_RAM_BYTES, Path(sockets, "q"), Path(sockets, "s"), kernel)
            with started(guest, Path(sockets, "log")) as vm:
                with vm.open_monitor() as qmp:
                    qmp.command("cont")
                vm.serial.expect("ready")
                vm.serial.ask("fill 1", "filled", _FILL_SECONDS)
                take_snapshot(Options(vm.monitor, Path(near, "snapshot")), Reporter())
            shutil.move(Path(near, "snapshot"), folder)
    return adopt(folder)


def _run(context: Context, kind: Kind, image: Image) -> Sample:
    with context.mounted(image) as (mount, _, folder), ExitStack() as running:
        clones: list[Clone] = []
        figures: dict[str, float] = {}
        for count in COUNTS:
            before = len(clones)
            clones += [
                running.enter_context(cloned(kind, number, mount.ram, folder)) for number in range(before, count)
            ]
            times = [clone.start_seconds for clone in clones[before:]]
            name = f"{before + 1}_to_{count}" if count > 1 else "1"
            figures[f"start_{name}_seconds"] = statistics.median(times)
            figures |= _looked_at(mount, clones)
        last, first = COUNTS[-1], COUNTS[0]
        for what in ("pss", "private"):
            more = figures[f"{what}_{last}_bytes"] - figures[f"{what}_{first}_bytes"]
            figures[f"{what}_each_further_bytes"] = more / (last - first)
        taken = figures[f"available_{first}_bytes"] - figures[f"available_{last}_bytes"]
        figures["unavailable_each_further_bytes"] = taken / (last - first)
        figures["mount_cache_bytes"] = page_cache_bytes(mount.ram)
        figures["ready_seconds"] = mount.ready_seconds
    return context.sample(figures)


def _looked_at(mount: Mount, clones: list[Clone]) -> dict[str, float]:
    count = len(clones)
    memory = memory_of(tuple(pid for clone in clones for pid in clone.pids))
    return {
        f"received_{count}_bytes": mount.status()["wire_received_bytes"],
        f"pss_{count}_bytes": memory["Pss"],
        f"private_{count}_bytes": memory["Private_Clean"] + memory["Private_Dirty"],
        f"available_{count}_bytes": available_bytes(),
    }


def _measure(name: str, title: str, kind: Kind, image: Callable[[Path], Image]) -> Measure:
    def run(context: Context) -> Sample:
        return _run(context, kind, image(context.work))

    targets = (
        Target(
            f"{title}: to a running guest, the 5th to the 16th", "loopback", "lazymem-template", "start_5_to_16_seconds"
        ),
        Target(f"{title}: Pss for each further guest", "loopback", "lazymem-template", "pss_each_further_bytes"),
    )
    return Measure(name, title, pairs(("loopback", "1ms"), ("lazymem-template",)), run, targets)


VM = _measure("clones-vm", "guests in lazymem-vm from one template", _VM, _pages_image)
QEMU = _measure("clones-qemu", "Linux guests in QEMU from one template", _QEMU, linux_image)
