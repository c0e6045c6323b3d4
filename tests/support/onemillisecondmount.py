"""`lazymem-mount` whose daemon takes every link for one with round trips of a millisecond.

What it does over such a link can so be tested where the processors are too busy, or too slow, for any answer to come
in time for one. Started as ``python -m tests.support.onemillisecondmount ARGUMENTS``.
"""

from __future__ import annotations

import sys
from typing import Any

from lazymem.cli import mount
from lazymem.fetch.scheduler import Scheduler


def main() -> int:
    patched: Any = Scheduler
    patched.answer_seconds = lambda self: 0.001
    return mount.main()


if __name__ == "__main__":
    sys.exit(main())
