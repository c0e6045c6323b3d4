"""A process that writes to a mapped file as a guest does, verifies it, and says what is stored.

    ackwriter.py FILE SEED [ORIGINAL]

With ORIGINAL, a plain file, every page that it comes to must be that file's with its own writes over it; without, only
its own writes are looked at. With it, the kernel also forgets now and then what it has of FILE, so that it asks again.

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
FORGET_STEPS = 50
STAMP = struct.Struct("<QQ")


def stamp(number: int, seed: int) -> bytes:
    """The first bytes of a page after write `number`; 0 has none."""
    return STAMP.pack(number, seed)


def check(page: int, found: bytes, text: bytes, original: bytes) -> None:
    """Ends this process if `found` is not `original` with `text` over its beginning; empty: nothing is known of it."""
    if found[: len(text)] != text:
        raise SystemExit(f"page {page} lost its write: {found[:16]!r} instead of {text!r}")
    if original and found[len(text) :] != original[len(text) :]:
        wrong = sum(a != b for a, b in zip(found[len(text) :], original[len(text) :], strict=True))
        raise SystemExit(f"page {page} has {wrong} wrong bytes")


def main() -> None:
    seed = int(sys.argv[2])
    choose = random.Random(seed)
    descriptor = os.open(sys.argv[1], os.O_RDWR)
    mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    original = b""
    if len(sys.argv) > 3:
        with open(sys.argv[3], "rb") as file:
            original = file.read()
    written: dict[int, int] = {}
    longest = 0.0
    number = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        number += 1
        page = choose.randrange(len(mapped) // PAGE)
        at = page * PAGE
        begun = time.monotonic()
        text = stamp(written[page], seed) if page in written else b""
        if text or original:
            check(page, mapped[at : at + PAGE], text, original[at : at + PAGE])
        mapped[at : at + STAMP.size] = stamp(number, seed)
        mapped.flush(at, PAGE)
        longest = max(longest, time.monotonic() - begun)
        written[page] = number
        if original and number % FORGET_STEPS == 0:
            mapped.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        print(page, number, f"{longest:.4f}", flush=True)


if __name__ == "__main__":
    main()
