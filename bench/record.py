"""What a run of the benchmark writes down."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """What one sample is of: a measure, over a link, by a way."""

    measure: str
    link: str
    way: str


@dataclass(slots=True)
class Sample:
    """One run of a case. `figures`: name to value in seconds, bytes, or bytes a second, as the name's end says.

    `series`: name to numbers for plots. `problem` in place of figures: why there are none.
    """

    case: Case
    round: int
    figures: dict[str, float] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)
    problem: str | None = None


@dataclass(slots=True)
class Results:
    """A whole run."""

    machine: dict[str, Any]
    options: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)

    def values(self, case: Case, figure: str) -> list[float]:
        """The figure in each round that has it, in order of the rounds."""
        found = [s for s in self.samples if s.case == case and figure in s.figures]
        return [sample.figures[figure] for sample in sorted(found, key=lambda sample: sample.round)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        found = json.loads(text)
        samples = [Sample(**{**sample, "case": Case(**sample["case"])}) for sample in found["samples"]]
        return cls(found["machine"], found["options"], samples)

    def write(self, path: Path) -> None:
        path.write_text(self.to_json())
