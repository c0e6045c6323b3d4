"""`python -m bench`: options, the run, and what it leaves: results.json, results.md, plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import machine
from bench.links import LINKS
from bench.measures import MEASURES
from bench.plots import draw, is_there, plots_of
from bench.record import Results
from bench.runner import Plan, run
from bench.table import markdown
from bench.way import VARIANTS
from bench.ways import WAYS

_EPILOG = """examples:
  python -m bench                                        everything, three rounds: well over an hour
  python -m bench --measure touch --link loopback        one row
  python -m bench --measure linux --link 20ms --way local --way lazymem --way nbdfuse --rounds 1
  python -m bench --measure fill --way lazymem --way nbdfuse --protection
                                                         what TLS and the supervisor cost, in one table
  python -m bench --way lazymem-none+tls --way nbdfuse   every row of one way, with TLS and the supervisor on
  python -m bench --report .cache/bench/results          table and plots again, from results.json
"""

_SUFFIXES = (
    "of lazymem's also as WAY+tls, WAY+unsupervised, WAY+tls+unsupervised, WAY+unverified (by itself: no TLS, a "
    "supervisor, all verified), WAY+forked (from a fork server that runs already)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code: 1 when a case failed, 130 when it was interrupted."""
    found = _parser().parse_args(arguments)
    if found.list:
        print(_listing())
        return 0
    folder: Path = found.report or found.out or found.work / "results"
    results, ended = (_earlier(folder), True) if found.report else _measured(found, folder)
    report(results, folder, plots=not found.no_plots)
    if not ended:
        return 130
    return 1 if any(sample.problem for sample in results.samples) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="lazymem beside other ways to resume a guest from another host, over the same links.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--measure", action="append", choices=MEASURES, default=[], help="repeatable; default: all")
    parser.add_argument("--link", action="append", choices=LINKS, default=[], help="repeatable; default: all")
    parser.add_argument(
        "--way",
        action="append",
        choices=WAYS,
        default=[],
        metavar="WAY",
        help=f"repeatable; default: all of --list; {_SUFFIXES}",
    )
    parser.add_argument(
        "--protection",
        action="store_true",
        help="lazymem's ways in all of their variants, and a table of what each costs",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--image-mib", type=int, default=512, metavar="MIB", help="default: %(default)s")
    parser.add_argument("--touches", type=int, default=20_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path(".cache/bench"), metavar="DIR", help="images are kept here")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results (default: WORK/results)")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="measure nothing; table and plots of earlier results"
    )
    parser.add_argument("--no-plots", action="store_true", help="without matplotlib")
    parser.add_argument("--list", action="store_true", help="what can be measured")
    return parser


def _listing() -> str:
    lines = []
    for measure in MEASURES.values():
        lines.append(f"{measure.name:12} {measure.title}")
        for link in dict.fromkeys(link for link, _ in measure.cases):
            ways = " ".join(way for name, way in measure.cases if name == link)
            lines.append(f"{'':12} {link}: {ways}")
    return "\n".join(lines)


def _earlier(folder: Path) -> Results:
    return Results.from_json((folder / "results.json").read_text())


def _measured(found: argparse.Namespace, folder: Path) -> tuple[Results, bool]:
    """What was measured, and whether that is all."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        tuple(found.measure),
        tuple(found.link),
        tuple(found.way),
        found.rounds,
        found.image_mib,
        found.touches,
        VARIANTS if found.protection else (),
    )
    options = {"rounds": plan.rounds, "image_mib": plan.image_mib, "touches": plan.touches}
    results = Results(machine.describe(), options)
    try:
        for sample in run(plan, found.work, lambda text: print(text, flush=True)):
            results.samples.append(sample)
            results.write(folder / "results.json")  # whatever ends the run, what was measured is there
    except KeyboardInterrupt:
        print("interrupted; the report is of what was measured so far", file=sys.stderr)
        return results, False
    return results, True


def report(results: Results, folder: Path, *, plots: bool) -> None:
    """Writes results.md and the plots into `folder`, and prints the table."""
    links = {link.name: link.title for link in LINKS.values()}
    ways = {way.name: way.title for way in WAYS.values()}
    text = markdown(results, list(MEASURES.values()), links, ways)
    (folder / "results.md").write_text(text)
    print(text)
    if plots and not is_there():
        print("no plots: matplotlib is not there (`make bench` installs it; --no-plots asks for none)", file=sys.stderr)
    elif plots:
        draw(plots_of(results, links, ways), folder)
    print(f"written to {folder}")
