"""How long a guest stands when it goes to another host: lazymem's hand-over beside QEMU's own post-copy."""

from __future__ import annotations

from functools import partial

from bench.context import Context, Measure, Target, pairs
from bench.handover import handed_over
from bench.linuximage import linux_image
from bench.postcopy import migrated
from bench.record import Sample
from bench.way import NO_MOUNT

_NAMES = ("downtime_seconds", "total_seconds", "state_bytes", "wire_received_bytes", "demand_faults")


def _run(context: Context, *, screen: bool = False) -> Sample:
    image = linux_image(context.work, screen=screen)
    with context.folder() as folder:
        if context.way.name == "postcopy":
            with migrated(context.link, image, folder, screen=screen) as guest:
                figures = {"downtime_seconds": guest.downtime_seconds}
                figures["total_seconds"] = guest.wait_done() - guest.started
            return context.sample(figures)
        report = handed_over(context.link, image, folder, screen=screen, tls=context.way.variant.tls)
    return context.sample({name: float(report[name]) for name in _NAMES if report.get(name) is not None})


MEASURE = Measure(
    "handover",
    "a Linux guest goes to another host: how long it stands",
    pairs(("1ms", "20ms"), ("lazymem", "postcopy")),
    _run,
    (
        Target("downtime, beside QEMU post-copy", "1ms", "lazymem", "downtime_seconds", "postcopy", must=1.0),
        Target("downtime, beside QEMU post-copy", "20ms", "lazymem", "downtime_seconds", "postcopy", must=1.0),
    ),
    NO_MOUNT,
)

_WARM_SECONDS = 60.0
"""More than the guest's 160 MB take at 100 Mb/s; it ends by itself when little changes any more."""

_REST_NAMES = ("rest_seconds", "warm_seconds", "warmed_bytes", "candidates_used", "candidates_refused")


def _run_warm(context: Context) -> Sample:
    image = linux_image(context.work)
    with context.folder() as folder:
        warm = _WARM_SECONDS if context.way.name == "lazymem-warm" else 0.0
        report = handed_over(context.link, image, folder, tls=context.way.variant.tls, warm=warm)
    names = (*_NAMES, *_REST_NAMES)
    return context.sample({name: float(report[name]) for name in names if report.get(name) is not None})


WARM_MEASURE = Measure(
    "warm",
    "the same with --warm: from the moment at which it runs there until all of its RAM is there",
    pairs(("1ms", "20ms"), ("lazymem", "lazymem-warm")),
    _run_warm,
    (
        Target("a hand-over's rest, with --warm", "1ms", "lazymem-warm", "rest_seconds", "lazymem"),
        Target("a hand-over's rest, with --warm", "20ms", "lazymem-warm", "rest_seconds", "lazymem"),
    ),
    NO_MOUNT,
)

SCREEN_MEASURE = Measure(
    "screen",
    "the same, of a guest that writes its screen all the time",
    pairs(("1ms", "20ms"), ("lazymem", "postcopy")),
    partial(_run, screen=True),
    (
        Target("the same with a written screen", "1ms", "lazymem", "downtime_seconds", "postcopy", must=1.0),
        Target("the same with a written screen", "20ms", "lazymem", "downtime_seconds", "postcopy", must=1.0),
    ),
    NO_MOUNT,
)
