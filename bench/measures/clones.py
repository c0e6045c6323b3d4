"""Many guests, one image: 1, 4 and 16 from one template, by time, host memory and bytes received."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench.clones import Clone, Kind, available_bytes, cloned, memory_of
from bench.context import Context, Measure, Target, pairs
from bench.images import Image
from bench.linuximage import RAM_BYTES, SMALL_MIB, linux_image
from bench.measures.memory import page_cache_bytes
from bench.pagesimage import pages_image
from bench.record import Sample
from bench.way import Mount

COUNTS = (1, 4, 16)
PAGES_RAM_BYTES = 32 << 20

_VM = Kind("unicorn", PAGES_RAM_BYTES, "verify", "verified")
_QEMU = Kind("qemu", RAM_BYTES, f"read {SMALL_MIB}", "read")


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


VM = _measure(
    "clones-vm", "guests in lazymem-vm from one template", _VM, partial(pages_image, ram_bytes=PAGES_RAM_BYTES)
)
QEMU = _measure("clones-qemu", "Linux guests in QEMU from one template", _QEMU, linux_image)
