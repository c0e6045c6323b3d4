"""Results as Markdown: the rows of the goals, and every figure of every way. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bench import costs
from bench.context import Measure, Target
from bench.record import Case, Results
from bench.summary import Summary, ratio, summarize
from bench.units import shown
from bench.way import ALL_VARIANTS, Variant


def markdown(results: Results, measures: Sequence[Measure], links: dict[str, str], ways: dict[str, str]) -> str:
    """The whole report. `links` and `ways`: name to title."""
    parts = ["# lazymem's benchmark", "", *_machine(results), "", "## Goals", "", *_goals(results, measures, links)]
    for measure in measures:
        rows = list(_figures(results, measure, links, ways))
        if rows:
            parts += ["", f"## `{measure.name}`: {measure.title}", "", *_table(_FIGURE_HEAD, rows)]
    rows = list(costs.rows(results, measures, links))
    if rows:
        parts += ["", "## What TLS and the supervisor cost", "", *_table(costs.HEAD, rows)]
    problems = [f"- {s.case.measure} {s.case.link} {s.case.way}: {s.problem}" for s in results.samples if s.problem]
    if problems:
        parts += ["", "## What failed", "", *dict.fromkeys(problems)]
    return "\n".join(parts) + "\n"


def _machine(results: Results) -> list[str]:
    machine = results.machine
    programs = ", ".join(text for text in machine["programs"].values() if text)
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return [
        f"Commit {machine['commit']}. {machine['processors']} x {machine['processor']}, "
        f"{machine['memory_bytes'] / (1 << 30):.0f} GiB, Linux {machine['kernel']}, Python {machine['python']}; "
        f"load at the start {machine['load']:.1f}. {packages}. {programs}. Options: {results.options}.",
        "",
        "Medians over the rounds (lowest to highest). All of lazymem's with verification on.",
    ]


# --- the goals

_GOAL_HEAD = ("link", "measure", "ours", "beside", "ratio or value", "must", "aim", "met")


def _goals(results: Results, measures: Sequence[Measure], links: dict[str, str]) -> list[str]:
    rows = []
    for measure in measures:
        for target in measure.targets:
            for variant in filter(_reaches, ALL_VARIANTS):
                row = _goal(results, measure, _of_variant(target, variant))
                if row:
                    rows.append((links[target.link], target.title + variant.title, *row))
    return _table(_GOAL_HEAD, rows) if rows else ["No goal's figures were measured."]


def _reaches(variant: Variant) -> bool:
    """Whether it can reach a goal: not without verification (rule 3)."""
    return variant.verified


def _of_variant(target: Target, variant: Variant) -> Target:
    """The goal for lazymem's ways with this protection; beside one of our own, that has the same."""
    beside = target.beside
    if beside is not None and beside.startswith("lazymem"):
        beside += variant.suffix
    return replace(target, way=target.way + variant.suffix, beside=beside)


def _goal(results: Results, measure: Measure, target: Target) -> tuple[str, ...] | None:
    ours = _values(results, measure, target, target.way, target.figure)
    if not ours:
        return None
    if target.beside is None:
        judged: Summary | None = summarize(ours)
        beside, more = "-", None
    else:
        theirs = _values(results, measure, target, target.beside, target.other_figure or target.figure)
        judged = ratio(ours, theirs)
        beside = f"{shown(summarize(theirs).median, target.figure)}" if theirs else "-"
        more = summarize(ours).median - summarize(theirs).median if theirs else None
    figure = target.figure if target.beside is None else "ratio"
    return (
        shown(summarize(ours).median, target.figure),
        f"{target.beside} {beside}" if target.beside else "-",
        _with_spread(judged, figure) if judged else "-",
        _border(target.must, figure, target.at_least) + _slack(target),
        _border(target.aim, figure, target.at_least),
        _met(judged, target, more),
    )


def _values(results: Results, measure: Measure, target: Target, way: str, figure: str) -> list[float]:
    """In each round; with `beyond`, less that way's median."""
    values = results.values(Case(measure.name, target.link, way), figure)
    if target.beyond is None or not values:
        return values
    base = results.values(Case(measure.name, target.link, target.beyond), figure)
    return [value - summarize(base).median for value in values] if base else []


def _border(value: float | None, figure: str, at_least: bool) -> str:
    return "" if value is None else f"{'>=' if at_least else '<='} {shown(value, figure)}"


def _slack(target: Target) -> str:
    return "" if target.slack is None else f" or + {shown(target.slack, target.figure)}"


def _met(judged: Summary | None, target: Target, maybe_more: float | None) -> str:
    """`maybe_more`: by how much ours is larger than theirs."""
    if judged is None or target.must is None:
        return ""

    def reaches(border: float) -> bool:
        return judged.median >= border if target.at_least else judged.median <= border

    if target.aim is not None and reaches(target.aim):
        return "yes, the aim too"
    is_within_slack = target.slack is not None and maybe_more is not None and maybe_more <= target.slack
    return "yes" if reaches(target.must) or is_within_slack else "**no**"


# --- all figures

_FIGURE_HEAD = ("link", "way", "figure", "median", "spread", "rounds")


def _figures(
    results: Results, measure: Measure, links: dict[str, str], ways: dict[str, str]
) -> Iterable[tuple[str, ...]]:
    measured = {sample.case for sample in results.samples}
    for case in (Case(measure.name, link, way) for link in links for way in ways):
        if case not in measured:
            continue
        names = dict.fromkeys(name for sample in results.samples if sample.case == case for name in sample.figures)
        for name in names:
            found = summarize(results.values(case, name))
            spread = f"{shown(found.low, name)} to {shown(found.high, name)}"
            yield (
                links[case.link],
                ways[case.way],
                name.replace("_", " "),
                shown(found.median, name),
                spread,
                str(found.rounds),
            )


def _with_spread(found: Summary, figure: str) -> str:
    text = shown(found.median, figure)
    return f"{text} ({shown(found.low, figure)} to {shown(found.high, figure)})" if found.rounds > 1 else text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
