"""A link with a low rate to a server: the bench's relay, as a process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def slow_link(address: str, bytes_a_second: int, round_trip_seconds: float = 0.0) -> Iterator[str]:
    """The address at its near end."""
    words = ["--target", address, "--rate", str(bytes_a_second), "--round-trip", str(round_trip_seconds)]
    relay = subprocess.Popen(
        [sys.executable, "-m", "bench.relay", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert relay.stdout is not None
        yield f"127.0.0.1:{json.loads(relay.stdout.readline())['listening']}"
    finally:
        relay.terminate()
        relay.communicate()
