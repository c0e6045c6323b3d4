"""A guest's process: maps a RAM file and touches, writes, syncs and reads back a few pages for each line that it gets.

    python -m tests.support.sweptguest FILE

Each line on its input is a first page; it answers with a line of JSON: what it read of pages nobody wrote (`fetched`),
what it read back of those that it wrote (`back`), both as digests by page, and what refused to sync (`unsynced`). Being
a process of its own, it dies of SIGBUS where a guest would.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import sys

from lazymem.pages import PAGE_SIZE

STEP_PAGES = 10
"""What a line is about, from its first page on: one that is touched, three that are read, one that is written by a
touch, the rest by `pwrite`."""

TOUCHED, READ, STORED, PART, WHOLE = 0, range(1, 4), 4, 5, range(7, 9)
PART_AT, PART_BYTES = 50, PAGE_SIZE
"""In `PART`, so that it ends in the page behind it."""


def written(first: int) -> dict[int, bytes]:
    """What a step writes: bytes by offset in the file."""
    random_bytes = random.Random(first).randbytes
    return {
        (first + STORED) * PAGE_SIZE: random_bytes(PAGE_SIZE),
        (first + PART) * PAGE_SIZE + PART_AT: random_bytes(PART_BYTES),
        (first + WHOLE.start) * PAGE_SIZE: random_bytes(len(WHOLE) * PAGE_SIZE),
    }


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def step(descriptor: int, mapped: mmap.mmap, first: int) -> dict[str, object]:
    def read(page: int, count: int = 1) -> bytes:
        return os.pread(descriptor, count * PAGE_SIZE, page * PAGE_SIZE)

    stored, part, whole = written(first).items()
    fetched = [mapped[first * PAGE_SIZE : (first + 1) * PAGE_SIZE]]
    data = read(first + READ.start, len(READ))
    fetched += [data[at : at + PAGE_SIZE] for at in range(0, len(data), PAGE_SIZE)]
    mapped[stored[0] : stored[0] + PAGE_SIZE] = stored[1]
    for at, data in (part, whole):
        assert os.pwrite(descriptor, data, at) == len(data)
    unsynced = ""
    try:
        mapped.flush(first * PAGE_SIZE, STEP_PAGES * PAGE_SIZE)
    except OSError as error:
        unsynced = str(error)
    os.posix_fadvise(descriptor, first * PAGE_SIZE, STEP_PAGES * PAGE_SIZE, os.POSIX_FADV_DONTNEED)
    back = [read(page) for page in range(first, first + STEP_PAGES)]
    return {
        "fetched": {first + number: digest(found) for number, found in enumerate(fetched)},
        "back": {first + number: digest(found) for number, found in enumerate(back)},
        "unsynced": unsynced,
    }


def main(path: str) -> None:
    """Until the end of the input."""
    descriptor = os.open(path, os.O_RDWR)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    with mmap.mmap(descriptor, os.fstat(descriptor).st_size) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)
        for line in sys.stdin:
            print(json.dumps(step(descriptor, mapped, int(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
