"""A guest rewrites 1 GiB for two minutes: the daemon's processor time, and the guest's longest stall. And one that has
512 MiB in a memory control group of 128 MiB, so that the kernel stores, drops and reads its pages all the time.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable

from bench import images
from bench.context import Context, Measure, Target
from bench.held import cpu_seconds
from bench.memorygroup import memory_group
from bench.record import Sample
from bench.way import Mount, WayError
from lazymem.pages import PAGE_SIZE

SIZE_GIB = 1
SECONDS = 120.0
MUST_SECONDS = 0.05
"""No stall may be longer."""

_STEP_BYTES = 1 << 20
"""Written between two looks at the clock: 256 pages, some 20 us when nothing stalls."""


GROUP_LIMIT_BYTES = 128 << 20
GROUP_SIZE_GIB = 0.5


def _run(context: Context) -> Sample:
    with context.mounted(images.sparse(context.work, SIZE_GIB)) as (mount, _, _):
        return context.sample(_rewritten(mount, lambda command: command))


def _run_in_group(context: Context) -> Sample:
    """The guest alone is in the group: the mount's processes are as free as ever."""
    with (
        context.mounted(images.sparse(context.work, GROUP_SIZE_GIB)) as (mount, _, _),
        memory_group("lazymem-bench") as group,
    ):
        if isinstance(group, str):
            raise WayError(group)
        group.limit(GROUP_LIMIT_BYTES)
        figures = _rewritten(mount, lambda command: group.command(*command))
        figures |= {"limit_hits": group.limit_hits, "kills": group.kills}
        if not group.limit_hits:
            raise WayError("the guest was never short of memory")
    return context.sample(figures)


def _rewritten(mount: Mount, inside: Callable[[list[str]], list[str]]) -> dict[str, float]:
    """What two minutes gave; `inside` makes the guest's command one that runs where it shall."""
    assert mount.daemon_pid is not None
    before = cpu_seconds(mount.daemon_pid)
    command = [sys.executable, "-m", "bench.measures.rewrite", str(mount.ram), str(SECONDS)]
    done = subprocess.run(inside(command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise WayError(f"the guest ended with {done.returncode}: {done.stderr.strip()}")
    spent = cpu_seconds(mount.daemon_pid) - before
    passes, longest, long_steps = (float(word) for word in done.stdout.split())
    return {
        "daemon_cpu_seconds": spent,
        "longest_stall_seconds": longest,
        "stalls_over_50_ms": long_steps,
        "passes": passes,
        "pages_written": mount.status()["pages_written"],
    }


def main() -> None:
    """Maps the file that is named and writes one byte a page, over and over, for so many seconds."""
    descriptor = os.open(sys.argv[1], os.O_RDWR)
    view = memoryview(mmap.mmap(descriptor, os.fstat(descriptor).st_size))
    sum(view[::PAGE_SIZE])  # resident first: it is writing that is measured
    end = time.perf_counter() + float(sys.argv[2])
    passes, longest, long_steps, now = 0, 0.0, 0, time.perf_counter()
    while now < end:
        passes += 1
        what = bytes([passes % 255 + 1]) * (_STEP_BYTES // PAGE_SIZE)
        for at in range(0, len(view), _STEP_BYTES):
            started = now
            view[at : at + _STEP_BYTES : PAGE_SIZE] = what
            now = time.perf_counter()
            longest, long_steps = max(longest, now - started), long_steps + (now - started > MUST_SECONDS)
    print(passes, longest, long_steps)


MEASURE = Measure(
    "rewrite",
    "a guest rewrites 1 GiB for two minutes",
    (("loopback", "lazymem-none"),),
    _run,
    (
        Target(
            "rewriting 1 GiB for two minutes: longest stall",
            "loopback",
            "lazymem-none",
            "longest_stall_seconds",
            must=MUST_SECONDS,
        ),
    ),
)

IN_GROUP = Measure(
    "rewrite-group",
    "a guest rewrites 512 MiB in a memory control group of 128 MiB for two minutes",
    (("loopback", "lazymem-none"),),
    _run_in_group,
    (
        Target(
            "rewriting 512 MiB in a group of 128 MiB for two minutes: longest stall",
            "loopback",
            "lazymem-none",
            "longest_stall_seconds",
            must=MUST_SECONDS,
        ),
    ),
)

if __name__ == "__main__":
    main()
