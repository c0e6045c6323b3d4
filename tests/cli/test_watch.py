"""What the live view says of given records."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import trio
from rich.console import Console

from lazymem.cli import frontprogress, watch
from lazymem.cli.watch import Rates, dominant, headlines, map_text, time_to_go, waits, watch_json, with_rates
from lazymem.errors import MountError

RECORD: dict[str, Any] = {
    "mountpoint": "/mnt/ram", "snapshot": "web", "server": "h:1", "connection": "connected",
    "pages_total": 1000, "pages_held": 250, "pages_written": 3, "pages_in_flight": 16, "pages_demanded": 50,
    "pages_prefetched": 200, "demand_faults": 40, "wire_received_bytes": 0,
    "demand_wait_p50_seconds": 0.000250, "demand_wait_p99_seconds": 0.021,
    "fetch": {"wait_octaves": [[0.000256, 30], [0.000512, 0], [0.032768, 10]]},
    "map": {"pages_per_cell": 250, "guessed": [0.2, 0.0, 0.0, 0.6], "demanded": [0.8, 0.3, 0.0, 0.0],
            "written": [0.0, 0.1, 1.0, 0.4]},
}  # fmt: skip


def _later(**changes: int) -> Rates:
    """Two seconds from RECORD to RECORD with `changes`."""
    rates = Rates()
    rates.add(10.0, RECORD)
    rates.add(12.0, RECORD | changes)
    return rates


def test_time_to_go() -> None:
    assert time_to_go(RECORD, Rates()) == "to go: not known"
    assert time_to_go(RECORD, _later()) == "to go: not known"
    assert time_to_go(RECORD | {"pages_held": 300}, _later(pages_held=300)) == "to go: 0:00:28"
    assert time_to_go(RECORD | {"pages_held": 1000}, _later()) == "all is here"


def test_pages_that_were_dropped_are_no_progress() -> None:
    assert time_to_go(RECORD, _later(pages_held=200)) == "to go: not known"


def test_rates_forget_what_is_long_ago() -> None:
    rates = _later(pages_held=1000)
    for second in range(13, 30):
        rates.add(float(second), RECORD | {"pages_held": 1000})
    assert rates.per_second("pages_held") == 0.0


def test_the_map_has_a_letter_for_what_most_of_a_cell_is() -> None:
    letters, _, legend = map_text(RECORD["map"]).plain.partition("\n")
    assert letters == "+.#o"
    for name in ("written", "demanded", "guessed", "missing", "1000.0 KiB a letter"):
        assert name in legend


@pytest.mark.parametrize(
    ("shares", "kind"),
    [
        ({"written": 0.0, "demanded": 0.0, "guessed": 0.0}, "missing"),
        ({"written": 0.1, "demanded": 0.2, "guessed": 0.19}, "missing"),
        ({"written": 0.1, "demanded": 0.2, "guessed": 0.2}, "demanded"),
        ({"written": 1.0, "demanded": 0.0, "guessed": 0.0}, "written"),
    ],
)
def test_dominant(shares: dict[str, float], kind: str) -> None:
    assert dominant(shares)[0] == kind


def test_a_wide_map_is_broken_into_lines() -> None:
    cells = {"pages_per_cell": 1, **{name: [1.0] * 130 for name in ("guessed", "demanded", "written")}}
    assert [len(line) for line in map_text(cells).plain.splitlines()[:-1]] == [64, 64, 2]


def test_the_histogram_has_a_bar_for_the_least_count() -> None:
    first, *bars = waits(RECORD)
    assert "p50 250 us, p99 21 ms" in first
    assert [bar.count("=") for bar in bars] == [40, 0, 14]
    assert bars[0].startswith("up to  256 us")
    assert waits(RECORD | {"fetch": {"wait_octaves": []}}) == ["no demand fault has waited"]


def test_headlines() -> None:
    text = "\n".join(headlines(RECORD, _later(wire_received_bytes=4 << 20, demand_faults=80)))
    for part in ("/mnt/ram", "held  25.0% of 3.9 MiB", "wire 2.0 MiB/s", "faults 20/s", "guessed 200"):
        assert part in text


SET = {"touched": 90, "set_pages": 100, "set_touched": 80, "set_ready": 60}


def test_the_view_has_the_working_sets_hit_rate() -> None:
    def shown(record: dict[str, Any]) -> str:
        console = Console(width=100, file=io.StringIO(), record=True)
        console.print(watch.view(record, Rates()))
        return console.export_text()

    line = "working set: 80 of 100 pages asked for, 60 of these were here before that: 75%"
    assert line in shown(RECORD | {"working_set": SET})
    untouched = SET | {"set_touched": 0, "set_ready": 0}
    assert "working set: 0 of 100 pages asked for\n" in shown(RECORD | {"working_set": untouched}).replace(" \n", "\n")
    assert "working set" not in shown(RECORD | {"working_set": None})


def test_json_has_what_several_looks_tell() -> None:
    later = {"pages_held": 300, "demand_faults": 80, "wire_received_bytes": 4 << 20}
    found = with_rates(RECORD | later | {"working_set": SET}, _later(**later))
    assert found["rates"] == {
        "wire_received_bytes_per_second": 2 << 20,
        "ram_bytes_per_second": 25 * 4096,
        "demand_faults_per_second": 20,
    }
    assert found["seconds_to_go"] == 28
    assert found["working_set_hit_rate"] == 0.75
    assert found["map"] == RECORD["map"]
    assert with_rates(RECORD | {"pages_held": 1000}, _later())["seconds_to_go"] == 0
    none = with_rates(RECORD, _later())
    assert none["seconds_to_go"] is none["working_set_hit_rate"] is None


def test_json_lines_end_with_the_mount(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(watch, "INTERVAL_SECONDS", 0.0)
    records = iter([RECORD, RECORD | {"pages_held": 1000}])

    def look() -> dict[str, Any]:
        try:
            return next(records)
        except StopIteration:
            raise MountError("gone") from None

    assert watch_json(look) == 0
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["pages_held"], first["seconds_to_go"]) == (250, None)
    assert (last["pages_held"], last["seconds_to_go"]) == (1000, 0)
    with pytest.raises(MountError):
        watch_json(look)


def test_the_line_of_a_mount_in_front_fits_a_terminal() -> None:
    text = frontprogress.line(RECORD | {"pages_held": 300}, _later(pages_held=300, demand_faults=80))
    assert text == "held  30.0%  0.1 MB/s  20 faults/s  to go: 0:00:28"


async def test_a_mount_in_front_renews_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontprogress, "INTERVAL_SECONDS", 0.0)
    written: list[str] = []
    held = iter((250, 500, 750, 1000))

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 4:
            trio.from_thread.run_sync(scope.cancel)

    with trio.CancelScope() as scope:
        await frontprogress.show(lambda: json.dumps(RECORD | {"pages_held": next(held)}).encode(), write)
    assert [text.startswith(frontprogress.RENEW) for text in written] == [True] * 4
    assert "to go: not known" in written[0]
    assert "all is here" in written[3]
