"""What the server counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Of one session, or of all together."""

    requests: int = 0
    answered: int = 0
    bytes_sent: int = 0
    refused_pages: int = 0

    def add(self, other: Counters) -> None:
        self.requests += other.requests
        self.answered += other.answered
        self.bytes_sent += other.bytes_sent
        self.refused_pages += other.refused_pages
