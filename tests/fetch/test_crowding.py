"""Giving way by what the scheduler says of us."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazymem.fetch import crowding
from lazymem.fetch.crowding import CROWDED, FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS, Crowding, next_pause


def test_the_pause_doubles_while_it_is_crowded_and_goes_when_it_is_not() -> None:
    pause, seen = 0.0, []
    for share in [0.9] * 8 + [0.0] * 8:
        pause = next_pause(pause, share)
        seen.append(pause)
    assert seen[0] == FIRST_PAUSE_SECONDS
    assert seen[7] == MAX_PAUSE_SECONDS
    assert sorted(seen[:8]) == seen[:8]
    assert sorted(seen[7:], reverse=True) == seen[7:]
    assert seen[-1] == 0.0
    assert next_pause(0.0, CROWDED) == 0.0


def test_it_looks_at_what_waited_since_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(crowding, "perf_counter", lambda: now)
    (tmp_path / "schedstat").write_text("1000000000 5000000000 7\n")
    seen = Crowding(str(tmp_path / "schedstat"))
    (tmp_path / "schedstat").write_text("1010000000 5030000000 9\n")
    assert seen.pause_seconds() == 0.0, "too soon"
    now += 0.1
    assert seen.pause_seconds() == FIRST_PAUSE_SECONDS, "30 ms waited for 10 ms of work"
    now += 0.1
    (tmp_path / "schedstat").write_text("1050000000 5031000000 9\n")
    assert seen.pause_seconds() == 0.0
    seen.close()


def test_a_kernel_that_does_not_say() -> None:
    seen = Crowding("/nowhere/schedstat")
    assert seen.pause_seconds() == 0.0
    seen.close()


def test_the_real_file_counts_this_thread() -> None:
    seen = Crowding()
    before = seen._times()
    while seen._times()[0] == before[0]:  # until the kernel has accounted for some of this work
        sum(range(1000))
    assert seen._times()[0] > before[0]
    seen.close()
