"""Work for a guardian, as a process: ``python -m tests.support.guardedwork KIND``; it tells on stdout what it meets.

KIND: ``wait`` until the second interrupt, ends with 7; ``once``: kills itself, and the next one is as ``wait``;
``dies``: always; ``bug``: always raises.
"""

from __future__ import annotations

import os
import signal
import sys

import trio

from lazymem.cli import guardian
from lazymem.cli.guardian import Guard, guarded


def tell(line: str) -> None:
    print(line, flush=True)


def main(kind: str) -> int:
    def work(guard: Guard) -> int:
        tell(f"child {os.getpid()} again {guard.is_again}")
        if kind == "bug":
            raise RuntimeError("a bug")
        if kind == "dies" or (kind == "once" and not guard.is_again):
            os.kill(os.getpid(), signal.SIGKILL)
        trio.run(_wait, guard)
        return 7

    return guarded(work, tell)


async def _wait(guard: Guard) -> None:
    count = 0

    def interrupted() -> None:
        nonlocal count
        count += 1
        tell(f"interrupt {count}")
        if count == 2:
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.watch, interrupted, lambda: tell("alone"))
        await trio.testing.wait_all_tasks_blocked()
        tell("waits")


if __name__ == "__main__":
    import trio.testing

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup(1)
    guardian._PAUSE_SECONDS = (float(sys.argv[2]),) * 2
    sys.exit(main(sys.argv[1]))
