"""`lazymem demo`, as a process, that does not end before it is interrupted: when the guest has answered for the last
time, it stands still. ``python -m tests.support.standingdemo OPTIONS``"""

from __future__ import annotations

import sys
import time
from typing import Any

from lazymem.cli import demo
from lazymem.demo import runs

_await = runs._await


def _await_and_stand(line: Any, start: str, *more: Any) -> str:
    answer = _await(line, start, *more)
    while start == "verified":
        time.sleep(0.01)  # an interrupt ends it
    return answer


if __name__ == "__main__":
    runs._await = _await_and_stand  # type: ignore[assignment]  # that takes whatever the other does
    sys.exit(demo.main(sys.argv[1:]))
