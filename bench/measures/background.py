"""What the background costs a demand: waits of touches that missed while it fills, beside the same with it off."""

from __future__ import annotations

from bench.context import Context, Measure, Target, pairs
from bench.record import Sample
from bench.summary import quantile
from bench.touching import chosen, toucher

TOUCHES = 3000
TOUCHING_SECONDS = 8.0
"""At most. Over a fast link all is held before that, and what is touched from then on misses no more."""

SLACK_SECONDS = 0.002
"""What a demand may wait longer where twice its time without the background is less."""


def missed_waits(waits: list[float], demands: int) -> list[float]:
    """The waits of touches that missed, ascending. Hits are left out: they are what the background is good for, and
    would hide what it costs. One page is touched at a time, each by a READ of its own, so the daemon knows how many
    missed; which ones they were, time alone cannot tell over a fast link. The longest are taken for them: a hit that
    waited longer than a miss counts against us.
    """
    return sorted(waits)[max(0, len(waits) - demands) :]


def _run(context: Context) -> Sample:
    numbers = chosen(context.image, TOUCHES, context.round, nonzero=True)
    with (
        context.folder() as folder,
        context.served(context.image, folder) as (_, seen),
        toucher(folder, numbers) as hand,
        context.way.mount(seen, context.image, folder) as mount,
    ):
        hand.go(mount.ram, TOUCHING_SECONDS)
        touches = hand.result(context.image, numbers)
        status = mount.status()
    missed = missed_waits(touches.waits, status["demand_faults"])
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
    pairs(("loopback", "1ms", "20ms"), ("lazymem", "lazymem-none")),
    _run,
    tuple(
        Target(
            "demand wait p99, background filling, beside off",
            link,
            "lazymem",
            "missed_p99_seconds",
            "lazymem-none",
            must=2.0,
            slack=SLACK_SECONDS,
        )
        for link in ("loopback", "1ms", "20ms")
    ),
)
