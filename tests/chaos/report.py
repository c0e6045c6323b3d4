"""What a chaos run found: one record, as lines for people and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field


@dataclass
class Report:
    """`problems`: what must not be, a line each; with none of them the run passed."""

    seed: int
    seconds: float = 0.0
    rounds: int = 0
    rounds_over_tls: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    flipped_on_the_wire: int = 0
    reconnects: int = 0
    daemon_restarts: int = 0
    longest_stall_seconds: float = 0.0
    longest_stall_of: str = ""
    longest_recovery_seconds: float = 0.0
    """From the moment when everything was mended to the writer's next step."""
    writes_acknowledged: int = 0
    writes_lost: int = 0
    bytes_wrong: int = 0
    guest_checks: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not (self.problems or self.bytes_wrong or self.writes_lost)

    def stalled(self, seconds: float, who: str) -> None:
        """Somebody waited so long for one thing."""
        if seconds > self.longest_stall_seconds:
            self.longest_stall_seconds, self.longest_stall_of = seconds, who

    def to_json(self) -> str:
        return json.dumps({"passed": self.passed, **asdict(self)}, indent=2)

    def lines(self) -> list[str]:
        """For people."""
        width = max((len(name) for name in self.faults), default=0)
        return [
            f"{self.seconds:.0f} s in {self.rounds} rounds ({self.rounds_over_tls} over TLS), seed {self.seed}",
            f"faults injected: {self.faults.total()}",
            *(f"  {name:<{width}}  {count}" for name, count in sorted(self.faults.items())),
            f"pieces with a flipped bit on the wire: {self.flipped_on_the_wire}",
            f"reconnects: {self.reconnects}, daemons that went on after another: {self.daemon_restarts}",
            f"longest stall: {self.longest_stall_seconds:.1f} s ({self.longest_stall_of or 'nobody stalled'})",
            f"longest wait of the writer once everything was mended: {self.longest_recovery_seconds:.1f} s",
            f"writes acknowledged: {self.writes_acknowledged}, lost: {self.writes_lost}",
            f"checks of its memory by the guest: {self.guest_checks}",
            f"bytes wrong: {self.bytes_wrong}",
            *(f"PROBLEM: {problem}" for problem in self.problems),
            "passed" if self.passed else f"FAILED: --seed {self.seed} tries it again",
        ]
