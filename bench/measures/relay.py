"""The links themselves: what the relay makes of a round trip and of a rate."""

from __future__ import annotations

from bench.context import Context, Measure, pairs
from bench.record import Sample
from bench.relaycheck import check


def _run(context: Context) -> Sample:
    return context.sample(check(context.link))


MEASURE = Measure("relay", "the relay itself", pairs(("1ms", "20ms"), ("local",)), _run)
