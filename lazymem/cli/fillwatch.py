"""The daemon's side of the filling process: its order, what it reports, and who goes on when it does not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from lazymem.cli.fillprocess import FillOrder, FillProcess, FillReport
from lazymem.errors import StoreError
from lazymem.fetch.client import Client
from lazymem.fetch.lastdemand import LastDemand
from lazymem.fetch.prefetch import Prepager
from lazymem.fetch.recorded import RecordedSet
from lazymem.fetch.scheduler import Scheduler
from lazymem.fetch.sweep import sweep_of
from lazymem.pages import PageRange
from lazymem.store.pristine import PristinePages

log = logging.getLogger(__name__)


async def tell_link(client: Client, last_demand: LastDemand) -> None:
    """Have the filling process know whether demands have a connection. Until cancelled."""
    last_demand.can_be_sent = client.statistics().connected
    while True:
        await client.wait_connected()
        last_demand.can_be_sent = True
        await client.wait_lost()
        last_demand.can_be_sent = False


async def watch_fill(
    filler: FillProcess,
    order: FillOrder,
    recorded: Sequence[PageRange],
    pristine: PristinePages,
    scheduler: Scheduler,
    prepager: Prepager,
) -> None:
    """From its order to its end; what it cannot bring is brought here."""

    def on_report(report: FillReport) -> None:
        pristine.learn_held(report.held_pages)

    try:
        is_done = await filler.run(on_report, scheduler.others_kept)
    finally:
        scheduler.others_ended()
    if is_done:
        return
    log.warning("the filling process ended early (%s): going on without it", filler.latest.maybe_error or "killed")
    with contextlib.suppress(StoreError):  # then the count is too low until the next mount
        pristine.recount()  # what it held since its last report
    prepager.go_on_with(
        RecordedSet(pristine.next_missing, recorded),
        sweep_of(pristine.next_missing, pristine.total_pages, pristine.missing_leaves) if order.everything else None,
    )
    scheduler.look_for_guesses()
