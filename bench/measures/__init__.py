"""All measures, in the order of their weight."""

from __future__ import annotations

from bench.context import Measure
from bench.measures import (
    background,
    clients,
    clones,
    fill,
    handover,
    linux,
    memory,
    ready,
    relay,
    rewrite,
    stages,
    stream,
    touch,
    writes,
)

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        touch.SINGLE,
        touch.START,
        fill.FILL,
        fill.SEQUENTIAL,
        linux.MEASURE,
        stream.MEASURE,
        handover.MEASURE,
        *handover.SCREEN_MEASURES,
        *handover.VM_MEASURES,
        handover.WARM_MEASURE,
        background.MEASURE,
        writes.MEASURE,
        memory.MEASURE,
        ready.READY,
        ready.SPARSE,
        clients.MEASURE,
        clones.VM,
        clones.QEMU,
        rewrite.MEASURE,
        rewrite.IN_GROUP,
        stages.MEASURE,
        relay.MEASURE,
    )
}
