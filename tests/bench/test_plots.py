"""What is drawn of given results, the drawing itself, and what a run without matplotlib says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

from bench import cli, plots
from bench.record import Case, Results, Sample
from tests.bench.test_table import MACHINE
from tests.support import skips

LINKS = {"loopback": "loopback TCP", "1ms": "1 ms, 1 Gb/s"}
WAYS = {"lazymem": "lazymem", "nbdfuse": "nbdfuse"}


def _results() -> Results:
    touches, fill = Case("touch", "loopback", "lazymem"), Case("fill", "1ms", "nbdfuse")
    found = Results(MACHINE, {})
    found.samples = [
        Sample(touches, 0, series={"waits_seconds": [0.004, 0.001]}),
        Sample(touches, 1, series={"waits_seconds": [0.002]}),
        Sample(Case("touch", "loopback", "nbdfuse"), 0, series={"waits_seconds": [0.003]}),
        Sample(fill, 0, series={"held_at_seconds": [0.0, 2.0], "held_pages": [0.0, 256.0]}),
        Sample(Case("ready", "loopback", "lazymem"), 0, {"ready_seconds": 1.0}),
    ]
    return found


def test_waits_are_a_distribution_and_a_fill_is_a_curve() -> None:
    waits, held = plots.plots_of(_results(), LINKS, WAYS)
    assert (waits.name, waits.title, waits.log_x) == ("touch-loopback", "touch, loopback TCP", True)
    assert [(curve.x, curve.y) for curve in waits.curves] == [
        ([0.001, 0.004], [0.5, 1.0]),
        ([0.002], [1.0]),
        ([0.003], [1.0]),
    ]
    assert [(curve.label, curve.colour) for curve in waits.curves] == [
        ("lazymem", "C0"),
        (None, "C0"),
        ("nbdfuse", "C1"),
    ]
    assert (held.name, held.log_x) == ("fill-1ms", False)
    assert held.curves[0].y == [0.0, 1.0], "MiB"


@pytest.fixture
def matplotlib_or_stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the benchmark installs it; what stands in takes any call, and writes a file where one is to be."""
    if not plots.is_there():
        skips.stood_in(request.node, "a matplotlib that draws nothing, for the real one: `make bench` installs that")
        figure = MagicMock()
        figure.Figure.return_value.savefig.side_effect = lambda path: Path(path).write_text("<svg")
        modules: dict[str, Any] = {"matplotlib": MagicMock(), "matplotlib.figure": figure}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("matplotlib_or_stand_in")
def test_each_plot_is_a_file(tmp_path: Path) -> None:
    drawn = plots.draw(plots.plots_of(_results(), LINKS, WAYS), tmp_path)
    assert [path.name for path in drawn] == ["touch-loopback.svg", "fill-1ms.svg"]
    assert all("<svg" in path.read_text() for path in drawn)


def test_without_matplotlib_there_is_a_table_and_a_line_that_says_why_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> ModuleType | None:
        return None

    monkeypatch.setattr(plots, "find_spec", missing)
    results = _results()
    results.write(tmp_path / "results.json")
    assert cli.main(["--report", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert output.err.startswith("no plots: matplotlib is not there")
    assert "ready seconds" in (tmp_path / "results.md").read_text()
    assert not list(tmp_path.glob("*.svg"))
