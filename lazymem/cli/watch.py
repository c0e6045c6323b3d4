"""The live view of `lazymem status --watch`: what it shows (pure: records in, text out), and the loop that shows it;
with `--json` the same numbers for programs, a line a look.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lazymem.errors import MountError
from lazymem.pages import PAGE_SIZE

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

INTERVAL_SECONDS = 0.5
"""Fast enough to see a guest start. Each look costs the mount a few milliseconds."""

RATE_SECONDS = 5.0
"""Rates are means over this long: a fill comes in bursts."""

MAP_WIDTH = 64
BAR_WIDTH = 40

KINDS = (("written", "magenta", "#"), ("demanded", "yellow", "+"), ("guessed", "green", "o"))
"""What a page can be, its colour, and its letter for eyes and terminals without colour."""

MISSING = ("missing", "bright_black", ".")

Record = dict[str, Any]


def watch(look: Callable[[], Record]) -> int:
    """Show `look()` until ctrl-C or the mount's end; returns the command's exit code.

    Raises:
        MountError: there is no mount at the start.
    """
    from rich.live import Live

    looks = _looks(look)
    try:
        with Live(view(*next(looks)), auto_refresh=False) as live:
            for record, rates in looks:
                live.update(view(record, rates), refresh=True)
    except KeyboardInterrupt:
        return 0
    print("the mount has ended")
    return 0


def watch_json(look: Callable[[], Record]) -> int:
    """The same as a JSON object a line on stdout (`with_rates`).

    Raises:
        MountError: there is no mount at the start.
    """
    try:
        for record, rates in _looks(look):
            print(json.dumps(with_rates(record, rates)), flush=True)
    except BrokenPipeError:  # whoever read has seen enough; Python's own flush at the end would say so again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        pass
    return 0


def _looks(look: Callable[[], Record]) -> Iterator[tuple[Record, Rates]]:
    """At once, then one an interval, until the mount's end."""
    rates = Rates()
    record = look()
    while True:
        rates.add(time.monotonic(), record)
        yield record, rates
        time.sleep(INTERVAL_SECONDS)
        try:
            record = look()
        except MountError:
            return


class Rates:
    """How fast a few counters grow, over the last `RATE_SECONDS`."""

    NAMES = ("pages_held", "demand_faults", "wire_received_bytes")

    def __init__(self) -> None:
        self._seen: list[tuple[float, Record]] = []

    def add(self, now_seconds: float, record: Record) -> None:
        self._seen.append((now_seconds, {name: record[name] for name in self.NAMES}))
        while len(self._seen) > 2 and self._seen[0][0] < now_seconds - RATE_SECONDS:
            self._seen.pop(0)

    def per_second(self, name: str) -> float:
        """0.0 until it has been seen twice."""
        if len(self._seen) < 2:
            return 0.0
        (start, before), (end, after) = self._seen[0], self._seen[-1]
        return float(after[name] - before[name]) / (end - start) if end > start else 0.0


def with_rates(record: Record, rates: Rates) -> Record:
    """The record with what only several looks together tell, and `working_set_hit_rate` (`hit_rate`)."""
    return record | {
        "rates": {
            "wire_received_bytes_per_second": rates.per_second("wire_received_bytes"),
            "ram_bytes_per_second": rates.per_second("pages_held") * PAGE_SIZE,
            "demand_faults_per_second": rates.per_second("demand_faults"),
        },
        "seconds_to_go": maybe_seconds_to_go(record, rates),
        "working_set_hit_rate": hit_rate(record),
    }


def view(record: Record, rates: Rates) -> Group:
    """The whole screen."""
    from rich.console import Group
    from rich.text import Text

    return Group(
        Text("\n".join(headlines(record, rates))),
        Text(),
        map_text(record["map"]),
        Text(),
        Text("\n".join(waits(record))),
    )


def headlines(record: Record, rates: Rates) -> list[str]:
    """Names, how much is here, how fast the rest comes."""
    held, total = record["pages_held"], record["pages_total"]
    received, faults = rates.per_second("wire_received_bytes"), rates.per_second("demand_faults")
    return [
        f"{record['mountpoint']}  {record['snapshot']} from {record['server']}  {record['connection']}",
        f"held {held / total:6.1%} of {_size(total * PAGE_SIZE)}   written {_size(record['pages_written'] * PAGE_SIZE)}"
        f"   in flight {_size(record['pages_in_flight'] * PAGE_SIZE)}   {time_to_go(record, rates)}",
        f"wire {_size(received)}/s   RAM {_size(rates.per_second('pages_held') * PAGE_SIZE)}/s   faults {faults:.0f}/s"
        f"   demanded {record['pages_demanded']} pages, guessed {record['pages_prefetched']}",
        *working_set(record),
    ]


def hit_rate(record: Record) -> float | None:
    """Of the working set's pages that the guest has asked for, the share that was here before. None: it has asked for
    none of them, or there is no set."""
    found = record.get("working_set")
    return found["set_ready"] / found["set_touched"] if found and found["set_touched"] else None


def working_set(record: Record) -> list[str]:
    """A line, where a set is used."""
    found = record.get("working_set")
    if not found:
        return []
    rate = hit_rate(record)
    hits = "" if rate is None else f", {found['set_ready']} of these were here before that: {rate:.0%}"
    return [f"working set: {found['set_touched']} of {found['set_pages']} pages asked for{hits}"]


def maybe_seconds_to_go(record: Record, rates: Rates) -> float | None:
    """Until all is held, if nothing changes. None: nothing comes now."""
    missing = record["pages_total"] - record["pages_held"]
    if missing <= 0:
        return 0.0
    rate = rates.per_second("pages_held")
    return missing / rate if rate > 0 else None


def time_to_go(record: Record, rates: Rates) -> str:
    """The same, for people."""
    maybe_seconds = maybe_seconds_to_go(record, rates)
    if maybe_seconds is None:
        return "to go: not known"
    if maybe_seconds == 0:
        return "all is here"
    seconds = round(maybe_seconds)
    return f"to go: {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def map_text(found: Record) -> Text:
    """The RAM from its first page to its last, a letter a cell: the kind that most of it is; then what they mean."""
    from rich.text import Text

    text = Text()
    cells = len(found["written"])
    for cell in range(cells):
        _, colour, letter = dominant({name: found[name][cell] for name, _, _ in KINDS})
        text.append(letter + ("\n" if (cell + 1) % MAP_WIDTH == 0 and cell + 1 < cells else ""), style=colour)
    text.append("\n")
    for name, colour, letter in (*KINDS, MISSING):
        text.append(f"{letter} {name}  ", style=colour)
    text.append(f"{_size(found['pages_per_cell'] * PAGE_SIZE)} a letter")
    return text


def dominant(shares: dict[str, float]) -> tuple[str, str, str]:
    """The kind of most pages of a cell; missing only where more than half is."""
    if sum(shares.values()) < 0.5:
        return MISSING
    return max(KINDS, key=lambda kind: shares[kind[0]])


def waits(record: Record) -> list[str]:
    """The histogram of demand faults' waiting times, a bar for each doubling."""
    octaves: Sequence[tuple[float, int]] = record["fetch"]["wait_octaves"]
    if not octaves:
        return ["no demand fault has waited"]
    most = max(count for _, count in octaves)
    lines = [
        f"up to {_seconds(edge):>7} {'=' * -(-count * BAR_WIDTH // most):<{BAR_WIDTH}} {count}"
        for edge, count in octaves
    ]
    middle, high = record["demand_wait_p50_seconds"], record["demand_wait_p99_seconds"]
    return [f"waits of demand faults: p50 {_seconds(middle)}, p99 {_seconds(high)}", *lines]


def _seconds(value: float) -> str:
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if value * factor < 1000:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def _size(count_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(count_bytes) < 1024:
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} GiB"
