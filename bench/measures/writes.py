"""A guest's writes: first ones to clean resident pages, and a pass over dirty ones, beside a file on tmpfs."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.context import Context, Measure, Target, pairs
from bench.held import wait_held
from bench.record import Sample
from bench.way import copy_sparse
from lazymem.pages import PAGE_SIZE

PASSES = 5


def _run(context: Context) -> Sample:
    """`local` is the tmpfs."""
    if context.way.name == "local":
        with tempfile.TemporaryDirectory(prefix="lazymem-bench-", dir="/dev/shm") as name:
            copy_sparse(context.image.ram, Path(name, "ram"))
            return context.sample(_written(Path(name, "ram")))
    with context.mounted(context.image) as (mount, _, _):
        if mount.is_lazymem:
            wait_held(mount)
        return context.sample(_written(mount.ram))


def _written(ram: Path) -> dict[str, float]:
    """In a process of its own: a writer that waits for its own interpreter's daemon would never come back."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.measures.writes", str(ram)], capture_output=True, text=True, check=True
    )
    first, again, count = (float(word) for word in done.stdout.split())
    return {"first_write_seconds_per_page": first / count, "dirty_pass_seconds": again}


def main() -> None:
    """Maps the file that is named, reads every page, then writes one byte a page, in C."""
    from time import perf_counter

    descriptor = os.open(sys.argv[1], os.O_RDWR)
    mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    view = memoryview(mapped)
    pages = len(view) // PAGE_SIZE
    sum(view[::PAGE_SIZE])
    passes = []
    for number in range(PASSES + 1):
        what = bytes([number + 1]) * pages
        started = perf_counter()
        view[::PAGE_SIZE] = what
        passes.append(perf_counter() - started)
    print(passes[0], min(passes[1:]), pages)


MEASURE = Measure(
    "writes",
    "writes to resident pages",
    pairs(("loopback",), ("lazymem", "local")),
    _run,
    (
        Target(
            "one pass of writes over dirty pages, beside tmpfs",
            "loopback",
            "lazymem",
            "dirty_pass_seconds",
            "local",
            must=1.5,
        ),
        Target(
            "first write to a clean resident page", "loopback", "lazymem", "first_write_seconds_per_page", must=2e-6
        ),
    ),
)

if __name__ == "__main__":
    main()
