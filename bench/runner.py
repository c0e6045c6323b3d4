"""Runs cases in rounds, the order mixed anew in each, and gives samples as they come."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import images
from bench.context import Context, Measure
from bench.links import LINKS
from bench.measures import MEASURES
from bench.record import Case, Sample
from bench.way import Variant, Way
from bench.ways import WAYS
from lazymem.errors import LazymemError

ORDER_SEED = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run; empty choices mean all. `variants`: of each of lazymem's ways among them, too."""

    measures: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    rounds: int = 3
    image_mib: int = 512
    touches: int = 20_000
    variants: tuple[Variant, ...] = ()

    def cases(self) -> list[Case]:
        """In the order of the measures."""
        return [
            Case(measure.name, link, way.name)
            for measure in MEASURES.values()
            if not self.measures or measure.name in self.measures
            for link in dict.fromkeys(link for link, _ in measure.cases)
            if not self.links or link in self.links
            for way in WAYS.values()
            if measure.offers(link, way) and self._wants(measure, link, way)
        ]

    def _wants(self, measure: Measure, link: str, way: Way) -> bool:
        if way.name in self.ways:
            return True
        if way.is_lazymem and way.variant in self.variants and (not self.ways or way.base in self.ways):
            return True
        return not self.ways and (link, way.name) in measure.cases


def mixed(cases: list[Case], round_number: int) -> list[Case]:
    """The round's order: ways of one measure and link stay side by side, since their ratio is what counts."""
    choose = random.Random(ORDER_SEED + round_number)
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.measure, case.link), []).append(case)
    order = list(groups.values())
    choose.shuffle(order)
    for group in order:
        choose.shuffle(group)
    return [case for group in order for case in group]


def run(plan: Plan, work: Path, say: Callable[[str], None]) -> Iterator[Sample]:
    """Every case in every round; a case that fails gives a sample with its problem, and the others go on."""
    image = images.synthetic(work, plan.image_mib)
    for round_number in range(plan.rounds):
        for case in mixed(plan.cases(), round_number):
            context = Context(case, LINKS[case.link], WAYS[case.way], round_number, work, image, plan.touches)
            started = time.monotonic()
            sample = _run_one(context)
            outcome = sample.problem or ", ".join(f"{name} {value:.6g}" for name, value in sample.figures.items())
            say(
                f"round {round_number + 1}/{plan.rounds} {case.measure} {case.link} {case.way} "
                f"({time.monotonic() - started:.1f} s): {outcome}"
            )
            yield sample


def _run_one(context: Context) -> Sample:
    try:
        return MEASURES[context.case.measure].run(context)
    except (LazymemError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return Sample(context.case, context.round, problem=f"{type(error).__name__}: {error}")
