"""A Linux guest's RAM wholly here: lazymem's fill beside QEMU post-copy's stream and a copy."""

from __future__ import annotations

from bench.context import Context, Measure, Target, pairs
from bench.linuximage import linux_image
from bench.measures.fill import fill_figures
from bench.postcopy import migrated
from bench.record import Sample


def _run(context: Context) -> Sample:
    image = linux_image(context.work)
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
    "everything of a Linux guest held",
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
