"""How long a guest stands when it goes to another host: lazymem's hand-over beside QEMU's own post-copy."""

from __future__ import annotations

from functools import partial

from bench.context import Context, Measure, Target, pairs
from bench.handover import handed_over, linux_guest, pages_guest
from bench.linuximage import linux_image
from bench.pagesimage import pages_image
from bench.postcopy import migrated
from bench.record import Sample
from bench.way import NO_MOUNT

_LINKS = ("1ms", "20ms")
_NAMES = ("downtime_seconds", "total_seconds", "state_bytes", "wire_received_bytes", "demand_faults")

_VM_RAM_BYTES = 258 << 20
"""Of which its guest fills, and rewrites, all but 2 MiB and what says which page was written when."""


def _sample(context: Context, report: dict[str, object], *more: str) -> Sample:
    names = (*_NAMES, *more)
    return context.sample({name: float(str(report[name])) for name in names if report.get(name) is not None})


def _run(context: Context, *, draws: str = "") -> Sample:
    image = linux_image(context.work, screen=bool(draws))
    with context.folder() as folder:
        if context.way.name == "postcopy":
            with migrated(context.link, image, folder, draws=draws) as guest:
                figures = {"downtime_seconds": guest.downtime_seconds}
                figures["total_seconds"] = guest.wait_done() - guest.started
            return context.sample(figures)
        tls = context.way.variant.tls
        return _sample(context, handed_over(context.link, linux_guest(image, draws=draws), folder, tls=tls))


def _beside_postcopy(name: str, title: str, goal: str, *, draws: str = "") -> Measure:
    targets = tuple(Target(goal, link, "lazymem", "downtime_seconds", "postcopy", must=1.0) for link in _LINKS)
    cases = pairs(_LINKS, ("lazymem", "postcopy"))
    return Measure(name, title, cases, partial(_run, draws=draws), targets, NO_MOUNT)


MEASURE = _beside_postcopy(
    "handover", "a Linux guest goes to another host: how long it stands", "downtime, beside QEMU post-copy"
)

SCREEN_MEASURES = (
    _beside_postcopy(
        "screen-idle",
        "the same, of a guest that has a screen and does not write it",
        "the same with a screen at rest",
        draws="once",
    ),
    _beside_postcopy(
        "screen",
        "the same, of a guest that writes its screen all the time",
        "the same with a written screen",
        draws="plain",
    ),
    _beside_postcopy(
        "screen-text",
        "the same, of a guest whose screen is a console that scrolls all the time",
        "the same with a console that scrolls",
        draws="text",
    ),
    _beside_postcopy(
        "screen-video",
        "the same, of a guest whose screen is a moving picture",
        "the same with a moving picture",
        draws="video",
    ),
    _beside_postcopy(
        "screen-noise",
        "the same, of a guest that writes its screen with noise",
        "the same with a screen of noise",
        draws="noise",
    ),
)


def _run_vm(context: Context, *, rewrites: bool) -> Sample:
    guest = pages_guest(pages_image(context.work, _VM_RAM_BYTES), rewrites=rewrites)
    with context.folder() as folder:
        return _sample(context, handed_over(context.link, guest, folder, tls=context.way.variant.tls))


def _in_lazymem_vm(name: str, title: str, *, rewrites: bool) -> Measure:
    targets = tuple(Target(f"downtime, {title}", link, "lazymem", "downtime_seconds") for link in _LINKS)
    run = partial(_run_vm, rewrites=rewrites)
    return Measure(name, f"a hand-over of {title}", pairs(_LINKS, ("lazymem",)), run, targets, NO_MOUNT)


VM_MEASURES = (
    _in_lazymem_vm("handover-vm", "an idle guest in lazymem-vm", rewrites=False),
    _in_lazymem_vm("rewriting-vm", "a guest in lazymem-vm that rewrites 256 MiB", rewrites=True),
)

_WARM_SECONDS = 60.0
"""More than the guest's 160 MB take at 100 Mb/s; it ends by itself when little changes any more."""

_REST_NAMES = ("rest_seconds", "warm_seconds", "warmed_bytes", "candidates_used", "candidates_refused")


def _run_warm(context: Context) -> Sample:
    guest = linux_guest(linux_image(context.work))
    warm = _WARM_SECONDS if context.way.name == "lazymem-warm" else 0.0
    with context.folder() as folder:
        report = handed_over(context.link, guest, folder, tls=context.way.variant.tls, warm=warm)
    return _sample(context, report, *_REST_NAMES)


WARM_MEASURE = Measure(
    "warm",
    "the same with --warm: from the moment at which it runs there until all of its RAM is there",
    pairs(_LINKS, ("lazymem", "lazymem-warm")),
    _run_warm,
    tuple(
        Target("a hand-over's rest, with --warm", link, "lazymem-warm", "rest_seconds", "lazymem") for link in _LINKS
    ),
    NO_MOUNT,
)
