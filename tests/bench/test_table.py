"""The Markdown report, from made-up results: goals reached and not, units, failures, JSON there and back."""

from __future__ import annotations

from typing import Any

import pytest

from bench.context import Context, Measure, Target
from bench.record import Case, Results, Sample
from bench.table import markdown
from bench.units import shown

MACHINE: dict[str, Any] = {
    "commit": "abc+",
    "processors": 2,
    "processor": "a processor",
    "memory_bytes": 16 << 30,
    "kernel": "6.1",
    "python": "3.11.2",
    "load": 0.5,
    "packages": {"trio": "0.30"},
    "programs": {"nbdkit": "nbdkit 1.32", "missing": None},
}
LINKS = {"loopback": "loopback TCP"}
WAYS = {"lazymem": "lazymem", "nbdfuse": "nbdfuse", "local": "local"}


def _never(context: Context) -> Sample:
    raise AssertionError("only its rows are wanted")


def _measure(*targets: Target) -> Measure:
    return Measure("touch", "touches", tuple(("loopback", way) for way in WAYS), _never, targets)


def _results(**figures: list[float]) -> Results:
    """`lazymem=[...]`: the figure `wait_seconds` of that way in each round."""
    samples = [
        Sample(Case("touch", "loopback", way), number, {"wait_seconds": value})
        for way, values in figures.items()
        for number, value in enumerate(values)
    ]
    return Results(MACHINE, {"rounds": 2}, samples)


def _goal_row(results: Results, target: Target) -> list[str]:
    lines = markdown(results, [_measure(target)], LINKS, WAYS).splitlines()
    (row,) = [line for line in lines if f"| {target.title} |" in line]
    return [cell.strip() for cell in row.strip("|").split("|")]


BESIDE = Target("waiting", "loopback", "lazymem", "wait_seconds", "nbdfuse", must=1.25, aim=1.0)


@pytest.mark.parametrize(
    ("ours", "met"), [([0.004, 0.008], "yes, the aim too"), ([0.012, 0.012], "yes"), ([0.02, 0.02], "**no**")]
)
def test_a_goal_says_whether_it_was_reached(ours: list[float], met: str) -> None:
    row = _goal_row(_results(lazymem=ours, nbdfuse=[0.010, 0.010]), BESIDE)
    assert row[0] == "loopback TCP"
    assert row[3] == "nbdfuse 10 ms"
    assert row[-3:] == ["<= 1.25", "<= 1", met]


@pytest.mark.parametrize(
    ("ours", "met"), [(0.0019, "yes"), (0.0029, "yes"), (0.0031, "**no**"), (0.0010, "yes, the aim too")]
)
def test_a_goal_may_be_twice_or_two_milliseconds_more_whichever_is_larger(ours: float, met: str) -> None:
    target = Target("wait", "loopback", "lazymem", "wait_seconds", "nbdfuse", must=2.0, aim=1.0, slack=0.002)
    row = _goal_row(_results(lazymem=[ours], nbdfuse=[0.001]), target)
    assert row[-3:] == ["<= 2 or + 2 ms", "<= 1", met]


def test_where_twice_is_larger_the_two_milliseconds_do_not_matter() -> None:
    target = Target("wait", "loopback", "lazymem", "wait_seconds", "nbdfuse", must=2.0, slack=0.002)
    assert _goal_row(_results(lazymem=[0.039], nbdfuse=[0.020]), target)[-1] == "yes"
    assert _goal_row(_results(lazymem=[0.041], nbdfuse=[0.020]), target)[-1] == "**no**"


def test_a_ratio_comes_with_its_spread() -> None:
    row = _goal_row(_results(lazymem=[0.005, 0.010], nbdfuse=[0.010, 0.010]), BESIDE)
    assert row[4] == "0.75 (0.5 to 1)"


def test_what_should_be_large_is_judged_the_other_way_round() -> None:
    target = Target("rate", "loopback", "lazymem", "wait_seconds", "nbdfuse", must=1.0, aim=1.5, at_least=True)
    assert _goal_row(_results(lazymem=[0.012], nbdfuse=[0.010]), target)[-3:] == [">= 1", ">= 1.5", "yes"]


def test_time_beyond_another_way_is_compared_without_it() -> None:
    target = Target("job", "loopback", "lazymem", "wait_seconds", "nbdfuse", must=0.4, beyond="local")
    row = _goal_row(_results(lazymem=[3.5], nbdfuse=[5.0], local=[3.0]), target)
    assert row[2:5] == ["500 ms", "nbdfuse 2 s", "0.25"]


def test_a_goal_without_its_peer_is_not_judged() -> None:
    assert _goal_row(_results(lazymem=[0.01]), BESIDE)[3:5] == ["nbdfuse -", "-"]
    assert _goal_row(_results(lazymem=[0.01]), BESIDE)[-1] == ""


def test_a_figure_that_was_not_measured_has_no_row() -> None:
    text = markdown(_results(nbdfuse=[0.01]), [_measure(BESIDE)], LINKS, WAYS)
    assert "No goal's figures were measured." in text
    assert "| loopback TCP | nbdfuse | wait seconds | 10 ms | 10 ms to 10 ms | 1 |" in text


def test_what_protection_costs_stands_in_one_row() -> None:
    ways = {name: name for name in ("lazymem", "lazymem+tls", "lazymem+unsupervised", "lazymem+tls+unsupervised")}
    results = Results(MACHINE, {"rounds": 2})
    for way, values in {
        "lazymem+unsupervised": (0.01, 0.02),
        "lazymem": (0.011, 0.022),
        "lazymem+tls": (0.02, 0.04),
    }.items():
        results.samples += [
            Sample(Case("touch", "loopback", way), number, {"wait_seconds": value})
            for number, value in enumerate(values)
        ]
    measure = Measure("touch", "touches", (("loopback", "lazymem"), ("loopback", "lazymem+tls")), _never, (BESIDE,))
    text = markdown(results, [measure], LINKS, ways)
    assert "| loopback TCP | touch | lazymem+tls |" not in text
    assert "| loopback TCP | touch | lazymem | wait seconds | 15 ms | 16.5 ms; x 1.10 | - | 30 ms; x 2.00 | - |" in text


def test_a_variants_goal_has_a_row_of_its_own() -> None:
    results = _results(lazymem=[0.012], nbdfuse=[0.010])
    results.samples.append(Sample(Case("touch", "loopback", "lazymem+tls"), 0, {"wait_seconds": 0.02}))
    text = markdown(results, [_measure(BESIDE)], LINKS, {**WAYS, "lazymem+tls": "lazymem, TLS"})
    assert "| loopback TCP | waiting | 12 ms | nbdfuse 10 ms | 1.2 |" in text
    assert "| loopback TCP | waiting, TLS | 20 ms | nbdfuse 10 ms | 2 |" in text


def test_a_failure_is_written_down_once() -> None:
    results = _results(lazymem=[0.01])
    for number in range(2):
        results.samples.append(Sample(Case("touch", "loopback", "nbdfuse"), number, problem="WayError: no | way"))
    text = markdown(results, [_measure(BESIDE)], LINKS, WAYS)
    assert text.count("- touch loopback nbdfuse: WayError: no | way") == 1


@pytest.mark.parametrize(
    ("value", "figure", "expected"),
    [
        (2.5, "held_seconds", "2.5 s"),
        (0.0312, "wait_p50_seconds", "31.2 ms"),
        (31.2e-6, "wait_p50_seconds", "31.2 us"),
        (0.0, "wait_p50_seconds", "0 us"),
        (1.25e8, "ram_bytes_per_second", "125 MB/s"),
        (64e6, "daemon_resident_bytes", "64 MB"),
        (12.0, "daemon_resident_bytes", "12 B"),
        (1.15, "seconds_over_zstd", "1.15"),
        (20000, "touches", "20000"),
    ],
)
def test_units_follow_from_the_figures_name(value: float, figure: str, expected: str) -> None:
    assert shown(value, figure) == expected


def test_results_survive_json() -> None:
    results = _results(lazymem=[0.01, 0.02])
    results.samples.append(Sample(Case("touch", "loopback", "nbdfuse"), 0, problem="gone"))
    assert Results.from_json(results.to_json()) == results
    assert results.values(Case("touch", "loopback", "lazymem"), "wait_seconds") == [0.01, 0.02]
