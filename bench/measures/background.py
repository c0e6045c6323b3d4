"""What the background costs a demand: waits of touches that missed while it fills, beside the same with it off."""

from __future__ import annotations

from bench.context import Context, Measure, Target, pairs
from bench.record import Sample
from bench.summary import quantile
from bench.touching import chosen, toucher

TOUCHES = 3000
FILL_SECONDS = 8.0
"""Of touching: shorter than any link here needs for the whole image, so that all of it happens while it fills."""

HIT_SECONDS = 0.0002
"""On loopback a touch that is shorter found its page in the daemon; on a slower link, one shorter than half a round
trip. Hits are left out: they are what the background is good for, and would hide what it costs."""


def _run(context: Context) -> Sample:
    numbers = chosen(context.image, TOUCHES, context.round, nonzero=True)
    with (
        context.folder() as folder,
        context.served(context.image, folder) as (_, seen),
        toucher(folder, numbers) as hand,
        context.way.mount(seen, context.image, folder) as mount,
    ):
        hand.go(mount.ram, FILL_SECONDS)
        touches = hand.result(context.image, numbers)
        status = mount.status()
    border = max(context.link.round_trip_seconds / 2, HIT_SECONDS)
    missed = sorted(wait for wait in touches.waits if wait >= border)
    figures = touches.figures()
    figures["missed"] = len(missed)
    figures["pages_held_at_end"] = status["pages_held"]
    if missed:
        figures["missed_p50_seconds"] = quantile(missed, 0.5)
        figures["missed_p99_seconds"] = quantile(missed, 0.99)
    if status["demand_wait_p99_seconds"] is not None:
        figures["daemon_demand_p99_seconds"] = status["demand_wait_p99_seconds"]
    return context.sample(figures, {"waits_seconds": missed[:: max(1, len(missed) // 1000)]})


MEASURE = Measure(
    "background",
    "demand wait while the background fills",
    pairs(("1ms", "20ms"), ("lazymem", "lazymem-none")),
    _run,
    tuple(
        Target(
            f"demand wait p99, background filling, beside off (or + 2 ms), {link}",
            link,
            "lazymem",
            "missed_p99_seconds",
            "lazymem-none",
            must=2.0,
        )
        for link in ("1ms", "20ms")
    ),
)
