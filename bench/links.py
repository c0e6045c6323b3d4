"""The links: loopback as it is, and two with a delay and a rate, each a relay process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """`rate_bytes` a second in each direction; 0 for no relay at all."""

    name: str
    title: str
    round_trip_seconds: float = 0.0
    rate_bytes: float = 0.0


LINKS = {
    link.name: link
    for link in (
        Link("loopback", "loopback TCP"),
        Link("1ms", "1 ms, 1 Gb/s", 0.001, 1e9 / 8),
        Link("20ms", "20 ms, 100 Mb/s", 0.020, 100e6 / 8),
    )
}


@dataclass(frozen=True, slots=True)
class Carried:
    """What a link has carried: towards the server and back, and what the relay spent on it."""

    forth_bytes: int
    back_bytes: int
    cpu_seconds: float


class Through:
    """A server seen through a link."""

    def __init__(self, address: str, relay: subprocess.Popen[str] | None) -> None:
        self.address = address
        self._relay = relay

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def maybe_carried(self) -> Carried | None:
        """None on loopback, which nobody counts."""
        if self._relay is None:
            return None
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        self._relay.stdin.write("\n")
        self._relay.stdin.flush()
        return Carried(**json.loads(self._relay.stdout.readline()))


@contextmanager
def through(link: Link, address: str) -> Iterator[Through]:
    """The server at `address` (HOST:PORT), through the link."""
    if not link.rate_bytes:
        yield Through(address, None)
        return
    command = [sys.executable, "-m", "bench.relay", "--target", address, "--rate", str(link.rate_bytes)]
    command += ["--round-trip", str(link.round_trip_seconds)]
    # A session of its own, so that an interrupt at the terminal does not end it before what uses it.
    relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert relay.stdin is not None
    assert relay.stdout is not None
    try:
        port = json.loads(relay.stdout.readline())["listening"]
        yield Through(f"127.0.0.1:{port}", relay)
    finally:
        relay.stdin.close()
        relay.wait(10)
        relay.stdout.close()
