"""The log of strangers is bounded, and tells what it left out."""

from __future__ import annotations

import pytest
from lazymem_server.fewlines import MOST_LINES, SECONDS, FewLines


def test_a_flood_is_some_lines_and_a_number(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    lines = FewLines(lambda: now[0])
    for number in range(1000):
        lines.warning("%s: refused", number)
    assert len(caplog.records) == MOST_LINES
    now[0] += SECONDS
    lines.warning("later")
    said = [record.getMessage() for record in caplog.records[MOST_LINES:]]
    assert said == [f"{1000 - MOST_LINES} more connections were refused in 10 s", "later"]
    now[0] += SECONDS
    lines.warning("later still")
    assert len(caplog.records) == MOST_LINES + 3
