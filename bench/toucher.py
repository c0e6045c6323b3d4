"""Touches pages of a mapped file as a guest would, in a process of its own, and says how long each touch waited.

Waits for one line on stdin, `{"file": ..., "pages": ..., "waits": ...}`: the file to map, a file of page numbers
(array of L), where the waiting times go (array of Q, nanoseconds). The sum of the touched bytes is in the answer, so
that whoever asked can see that they were the right ones.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from array import array
from time import perf_counter_ns

PAGE_SIZE = 4096


def main() -> int:
    """One job; returns the exit code."""
    print("{}", flush=True)
    line = sys.stdin.readline()
    if not line:
        return 1
    job = json.loads(line)
    numbers = array("L")
    with open(job["pages"], "rb") as file:
        numbers.frombytes(file.read())
    descriptor = os.open(job["file"], os.O_RDONLY)
    mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    waits, total, elapsed = touch(mapped, numbers, job.get("until_seconds"))
    with open(job["waits"], "wb") as file:
        waits.tofile(file)
    print(json.dumps({"byte_sum": total, "elapsed_ns": elapsed, "touched": len(waits)}), flush=True)
    return 0


def touch(mapped: mmap.mmap, numbers: array[int], until_seconds: float | None) -> tuple[array[int], int, int]:
    """(nanoseconds of each touch, sum of the bytes, nanoseconds of all)."""
    waits = array("Q")
    total = 0
    clock = perf_counter_ns
    begun = clock()
    end = begun + int(until_seconds * 1e9) if until_seconds else None
    for number in numbers:
        at = number * PAGE_SIZE
        started = clock()
        total += mapped[at]
        now = clock()
        waits.append(now - started)
        if end is not None and now > end:
            break
    return waits, total, clock() - begun


if __name__ == "__main__":
    sys.exit(main())
