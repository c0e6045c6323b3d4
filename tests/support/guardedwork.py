"""Work for a guardian, as a process: ``python -m tests.support.guardedwork KIND``; it tells on stdout what it meets.

KIND: ``wait`` until the second interrupt, ends with 7; ``once``: kills itself, and the next one is as ``wait``;
``dies``: always; ``bug``: always raises; ``late``: ends with 7, and is interrupted just then; ``slow``: as ``wait``,
once it has read a line from stdin; ``counts``: when it waits it reads that line, tells how many interrupts there were,
and ends with 7.

``wait:fork:N,...``: the Nth forks fail, of those that the guardian tries. With stdout closed it tells on stderr.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import signal
import sys
from collections.abc import Collection

import trio

from lazymem.cli import guardian
from lazymem.cli.guardian import Guard, guarded


def tell(line: str) -> None:
    print(line, file=sys.stdout or sys.stderr, flush=True)


def fail_forks(numbers: Collection[int]) -> None:
    fork, tries = os.fork, itertools.count(1)

    def failing() -> int:
        if next(tries) in numbers:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    os.fork = failing


def main(kind: str) -> int:
    def work(guard: Guard) -> int:
        tell(f"child {os.getpid()} again {guard.is_again}")
        if kind == "bug":
            raise RuntimeError("a bug")
        if kind == "dies" or (kind == "once" and not guard.is_again):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "late":
            guardian._flush = lambda: os.kill(os.getpid(), guardian._PASSED_ON)
            return 7
        if kind == "slow":
            # Not in a read, since Python hears of no signal that comes just before it.
            while not select.select([sys.stdin], [], [], 0.01)[0]:
                pass
            sys.stdin.readline()
        trio.run(_wait, guard, kind == "counts")
        return 7

    return guarded(work, tell)


async def _wait(guard: Guard, counts: bool) -> None:
    count = 0

    def interrupted() -> None:
        nonlocal count
        count += 1
        tell(f"interrupt {count}")
        if count == 2 and not counts:
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.watch, interrupted, lambda: tell("alone"))
        await trio.testing.wait_all_tasks_blocked()
        tell("waits")
        if counts:
            await trio.to_thread.run_sync(sys.stdin.readline)
            await trio.testing.wait_all_tasks_blocked()  # whoever has heard a signal has told
            tell(f"in all {count}")
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    import trio.testing

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup(1)
    guardian._PAUSE_SECONDS = (float(sys.argv[2]),) * 2
    name, _, failing = sys.argv[1].partition(":fork:")
    fail_forks([int(number) for number in filter(None, failing.split(","))])
    sys.exit(main(name))
