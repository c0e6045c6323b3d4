"""A process that writes to a mapped file as a guest does, verifies it, and says what is stored.

    ackwriter.py FILE SEED

It prints "PAGE NUMBER LONGEST" after each msync that returned: NUMBER stands in the first bytes of PAGE then, and the
longest step so far took LONGEST seconds. It ends when a line is put in. A wrong byte ends it with an error. Imports
nothing of ours.
"""

import mmap
import os
import random
import select
import struct
import sys
import time

PAGE = 4096
STAMP = struct.Struct("<QQ")


def stamp(number: int, seed: int) -> bytes:
    """The first bytes of a page after write `number`; 0 has none."""
    return STAMP.pack(number, seed)


def main() -> None:
    seed = int(sys.argv[2])
    choose = random.Random(seed)
    descriptor = os.open(sys.argv[1], os.O_RDWR)
    mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    written: dict[int, int] = {}
    longest = 0.0
    number = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        number += 1
        page = choose.randrange(len(mapped) // PAGE)
        at = page * PAGE
        begun = time.monotonic()
        if page in written and mapped[at : at + STAMP.size] != stamp(written[page], seed):
            raise SystemExit(f"page {page} lost write {written[page]}")
        mapped[at : at + STAMP.size] = stamp(number, seed)
        mapped.flush(at, PAGE)
        longest = max(longest, time.monotonic() - begun)
        written[page] = number
        print(page, number, f"{longest:.4f}", flush=True)


if __name__ == "__main__":
    main()
