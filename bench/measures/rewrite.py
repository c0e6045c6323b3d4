"""A guest rewrites 1 GiB for two minutes: the daemon's processor time, and the guest's longest stall."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time

from bench import images
from bench.context import Context, Measure, Target
from bench.held import cpu_seconds
from bench.record import Sample
from lazymem.pages import PAGE_SIZE

SIZE_GIB = 1
SECONDS = 120.0
_STEP_BYTES = 1 << 20
"""Written between two looks at the clock: 256 pages, some 20 us when nothing stalls."""


def _run(context: Context) -> Sample:
    with context.mounted(images.sparse(context.work, SIZE_GIB)) as (mount, _, _):
        assert mount.daemon_pid is not None
        before = cpu_seconds(mount.daemon_pid)
        command = [sys.executable, "-m", "bench.measures.rewrite", str(mount.ram), str(SECONDS)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        spent = cpu_seconds(mount.daemon_pid) - before
        written = mount.status()["pages_written"]
    passes, longest = (float(word) for word in done.stdout.split())
    figures = {
        "daemon_cpu_seconds": spent,
        "longest_stall_seconds": longest,
        "passes": passes,
        "pages_written": written,
    }
    return context.sample(figures)


def main() -> None:
    """Maps the file that is named and writes one byte a page, over and over, for so many seconds."""
    descriptor = os.open(sys.argv[1], os.O_RDWR)
    view = memoryview(mmap.mmap(descriptor, os.fstat(descriptor).st_size))
    sum(view[::PAGE_SIZE])  # resident first: it is writing that is measured
    end = time.perf_counter() + float(sys.argv[2])
    passes, longest, now = 0, 0.0, time.perf_counter()
    while now < end:
        passes += 1
        what = bytes([passes % 255 + 1]) * (_STEP_BYTES // PAGE_SIZE)
        for at in range(0, len(view), _STEP_BYTES):
            started = now
            view[at : at + _STEP_BYTES : PAGE_SIZE] = what
            now = time.perf_counter()
            longest = max(longest, now - started)
    print(passes, longest)


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
            must=0.05,
        ),
    ),
)

if __name__ == "__main__":
    main()
