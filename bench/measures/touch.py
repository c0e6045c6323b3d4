"""Random first touches of 4 KiB: one by one with guessing off, and 20,000 from the moment of mounting with it on."""

from __future__ import annotations

from array import array

from bench.context import Context, Measure, Target, pairs
from bench.record import Sample
from bench.touching import chosen, toucher

SINGLE_TOUCHES = 4000
SINGLE_SECONDS = 10.0
"""A median needs no more of a slow link."""


def _run_single(context: Context) -> Sample:
    """Pages with data only: what a zero page costs differs too much between ways to be in the same median."""
    numbers = chosen(context.image, min(context.touches, SINGLE_TOUCHES), context.round, nonzero=True)
    return _run(context, numbers, SINGLE_SECONDS)


def _run_start(context: Context) -> Sample:
    """Any page, half of them zero, as the image is."""
    return _run(context, chosen(context.image, context.touches, context.round, nonzero=False))


def _run(context: Context, numbers: array[int], until_seconds: float | None = None) -> Sample:
    with (
        context.folder() as folder,
        context.served(context.image, folder) as (_, seen),
        toucher(folder, numbers) as hand,
        context.way.mount(seen, context.image, folder) as mount,
    ):
        hand.go(mount.ram, until_seconds)
        touches = hand.result(context.image, numbers)
        figures = touches.figures()
        figures["ready_seconds"] = mount.ready_seconds
        if mount.is_lazymem:
            figures["pages_held"] = mount.status()["pages_held"]
    step = max(1, len(touches.waits) // 4000)
    return context.sample(figures, {"waits_seconds": sorted(touches.waits)[::step]})


SINGLE = Measure(
    "touch",
    "random 4 KiB first touch, guessing off",
    (*pairs(("loopback", "1ms", "20ms"), ("lazymem-none", "nbdfuse", "qsd")), ("loopback", "lazymem-none+tls")),
    _run_single,
    (
        Target(
            "random 4 KiB first touch, guessing off, p50, beside nbdfuse",
            "loopback",
            "lazymem-none",
            "wait_p50_seconds",
            "nbdfuse",
            must=1.25,
            aim=1.0,
        ),
    ),
)

START = Measure(
    "start",
    "20,000 touches from the moment of mounting",
    pairs(("loopback", "1ms"), ("lazymem", "nbdfuse", "qsd")),
    _run_start,
    (
        Target(
            "20,000 touches from mounting, guessing on: sum of waiting, beside nbdfuse",
            "loopback",
            "lazymem",
            "wait_sum_seconds",
            "nbdfuse",
            must=0.4,
            aim=0.25,
        ),
    ),
)
