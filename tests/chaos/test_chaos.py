"""A short chaos run; `make chaos` has longer ones. Its report says what would have to be mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.report import Report
from tests.chaos.run import run, say_nothing
from tests.support import skips

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(400),
    skips.needs_resend,
]


def test_nothing_is_lost_in_a_few_seconds_of_it(tmp_path: Path) -> None:
    report = run(tmp_path, seed=1, seconds=6, with_guest=True, say=say_nothing, tls_share=0)
    assert report.passed, "\n".join(report.lines())
    assert report.faults.total() > 0
    assert report.writes_acknowledged > 0
    assert report.guest_checks > 0


def test_nothing_is_lost_over_tls(tmp_path: Path) -> None:
    """Certificates on both sides, and a flipped bit ends a connection."""
    report = run(tmp_path, seed=3, seconds=4, with_guest=False, say=say_nothing, tls_share=1)
    assert report.passed, "\n".join(report.lines())
    assert report.rounds_over_tls == report.rounds > 0
    assert report.faults.total() > 0
    assert report.writes_acknowledged > 0


def test_a_report_fails_for_each_thing_that_must_not_be() -> None:
    good = Report(7)
    assert good.passed
    assert json.loads(good.to_json())["passed"]
    for bad in (Report(7, bytes_wrong=1), Report(7, writes_lost=1), Report(7, problems=["the guest is gone"])):
        assert not bad.passed
        assert "FAILED: --seed 7 tries it again" in bad.lines()
