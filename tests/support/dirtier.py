"""A process that dirties pages of a mapped file, over and over, as a guest: `python dirtier.py FILE SECONDS [HOLDS]`.

Two passes at least. With HOLDS it lets go of all of the file's memory whenever it has dirtied so many bytes: stored,
then reclaimed by the kernel, as for want of memory.

Prints, at the end, `passes pages longest_step_seconds steps_over_50_ms`. Imports nothing of ours: it is to be small.
"""

import mmap
import os
import sys
import time

PAGE = 4096
PAGEOUT = 21  # MADV_PAGEOUT: since Linux 5.4
STEP_PAGES = 256


def stamp(number: int, count: int) -> bytes:
    """What stands in the first byte of each of `count` pages after pass `number` (from 1 on)."""
    return bytes([number % 255 + 1]) * count


def main() -> None:
    descriptor = os.open(sys.argv[1], os.O_RDWR)
    mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    view = memoryview(mapped)
    holds = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    end = time.monotonic() + float(sys.argv[2])
    passes, longest, long_steps = 0, 0.0, 0
    while passes < 2 or time.monotonic() < end:
        passes += 1
        what = stamp(passes, STEP_PAGES)
        for at in range(0, len(view), STEP_PAGES * PAGE):
            started = time.monotonic()
            part = view[at : at + STEP_PAGES * PAGE : PAGE]
            part[:] = what[: len(part)]
            took = time.monotonic() - started
            longest, long_steps = max(longest, took), long_steps + (took > 0.05)
            if holds and (at + STEP_PAGES * PAGE) % holds == 0:
                mapped.flush()
                mapped.madvise(PAGEOUT)
    print(passes, len(view) // PAGE, f"{longest:.4f}", long_steps)


if __name__ == "__main__":
    main()
