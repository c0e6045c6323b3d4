"""A mount in front on a terminal: one line below the log that says how much is here, renewed each second."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import trio

from lazymem.cli.watch import Rates, time_to_go
from lazymem.pages import PAGE_SIZE

INTERVAL_SECONDS = 1.0

RENEW = "\r\x1b[2K"
"""To the line's begin, and nothing on it: also in front of each log line, which then takes the progress's place."""


async def show(look: Callable[[], bytes], write: Callable[[str], None] | None = None) -> None:
    """Until cancelled. `look` gives a status record as JSON."""
    rates = Rates()
    while True:
        record = json.loads(look())
        rates.add(trio.current_time(), record)
        # In a thread: a terminal that somebody has stopped (ctrl-S) must not stop a guest.
        await trio.to_thread.run_sync(write or _write, RENEW + line(record, rates), abandon_on_cancel=True)
        await trio.sleep(INTERVAL_SECONDS)


def line(record: dict[str, Any], rates: Rates) -> str:
    """What fits into 80 columns."""
    held = record["pages_held"] / record["pages_total"]
    rate = rates.per_second("pages_held") * PAGE_SIZE / 1e6
    faults = rates.per_second("demand_faults")
    return f"held {held:6.1%}  {rate:.1f} MB/s  {faults:.0f} faults/s  {time_to_go(record, rates)}"


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
