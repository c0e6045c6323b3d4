"""A Linux guest's RAM wholly here, the guest resumed and idle: lazymem's fill beside QEMU post-copy's stream.

The same work for both, from the destination's first process on. Post-copy has its guest run before it sends the rest,
so lazymem's runs on the mount while that fills. A copy comes before anything runs, and so has no guest beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.context import Context, Measure, Target, pairs
from bench.linuximage import linux_image
from bench.measures.fill import fill_figures
from bench.postcopy import migrated
from bench.record import Sample
from bench.way import Mount
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import started, take_over


@contextmanager
def _resumed(mount: Mount, folder: Path) -> Iterator[None]:
    """The guest, idle."""
    size = mount.ram.stat().st_size
    options = QemuOptions(mount.ram, size, folder / "qmp", folder / "serial", incoming="defer")
    with started(options, folder / "qemu.log") as qemu:
        with qemu.open_monitor() as qmp:
            take_over(qmp, mount.ram.parent / "vmstate")
        yield


def _run(context: Context) -> Sample:
    image = linux_image(context.work)
    if context.way.is_lazymem:
        return context.sample(*fill_figures(context, image, _resumed))
    if context.way.name != "postcopy":
        return context.sample(*fill_figures(context, image))
    with context.folder() as folder, migrated(context.link, image, folder) as guest:
        seconds = guest.wait_done() - guest.started
        figures = {"held_seconds": seconds, "ram_bytes_per_second": image.ram_bytes / seconds}
        carried = guest.seen.maybe_carried()
        if carried:
            figures["wire_bytes"] = carried.forth_bytes
    return context.sample(figures)


MEASURE = Measure(
    "stream",
    "everything of a Linux guest held, the guest running",
    pairs(("1ms", "20ms"), ("lazymem", "postcopy", "copy")),
    _run,
    (
        Target(
            "everything held, beside QEMU post-copy's stream",
            "1ms",
            "lazymem",
            "held_seconds",
            "postcopy",
            must=0.8,
            aim=0.5,
        ),
    ),
)
