"""Pages of a guest that runs, read over and over, as long as they change: candidates for whoever takes the guest over.

A process of its own (`python -m lazymem.handover.runningram PATH SECONDS NICENESS`), so that it has a priority of its
own. It reads no page that is not in this host's memory: what a mount would have to fetch, or a disk to bring, stays
where it is, and the kernel reads nothing ahead for it. PAGES frames of the page protocol go to its stdout, whose reader
sets the pace.

A page may change while it is read. Nobody minds: what is sent is believed only if it is what the page is in the end.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lazymem.digests import DIGEST_BYTES, ZERO_PAGE_DIGEST, differing, page_digests
from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, PageRange, runs
from lazymem.residency import read_alone, resident, runs_of_ones
from lazymem.snapshot.publishedfile import PublishedFile
from lazymem.wire.codec import encode
from lazymem.wire.messages import Encoding, Pages
from lazymem.wire.pagedata import FAST_LEVEL, compress_pages

WINDOW_PAGES = 16384
"""64 MiB are asked about at a time: by the time of their reading, most of what was in memory still is."""

PIECE_PAGES = 64
"""Read, hashed and compressed in a millisecond."""

FEW_PAGES = 256
FEW_SHARE = 1024
"""A pass that found no more than 1 MiB changed, or a 1024th part of the RAM, was good enough: the next is no better."""

PAUSE_SECONDS = 0.2
"""At least, between two passes; and as long as the pass has kept a processor."""

REQUEST_ID = 1
"""PAGES frames have one; here it means nothing."""


class RunningRam:
    """One guest's RAM file. `digests`: of what was sent last, 16 bytes a page; sparse memory, a 256th of the RAM."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._file = PublishedFile(os.dup(fd))
        self._pages = size_bytes >> PAGE_SHIFT
        self._digests = mmap.mmap(-1, self._pages * DIGEST_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._passes = 0
        self.changed_pages = 0
        """Sent by the last pass that was begun."""

    @property
    def is_steady(self) -> bool:
        """Whether another pass would find as much changed as the last one."""
        return self._passes > 0 and self.changed_pages <= min(FEW_PAGES, self._pages // FEW_SHARE)

    def frames(self) -> Iterator[bytes]:
        """One pass: what changed since the pass before, in order.

        Raises:
            OSError: the file cannot be read.
        """
        self.changed_pages = 0
        for window in PageRange(0, self._pages).pieces(WINDOW_PAGES):
            for piece, is_data in self._file.segments(window):
                if is_data:
                    yield from self._changed(piece)
                elif not self._passes:
                    yield from (_zeros(part) for part in piece.pieces(PIECE_PAGES * 4))
        self._passes += 1

    def _changed(self, pages: PageRange) -> Iterator[bytes]:
        for run in runs_of_ones(pages.start, resident(self._fd, pages)):
            for piece in run.pieces(PIECE_PAGES):
                yield from self._changed_of(piece, read_alone(self._fd, piece))

    def _changed_of(self, pages: PageRange, data: bytes) -> Iterator[bytes]:
        if len(data) != pages.length_bytes:
            return  # somebody cut the file: the hand-over will say so
        now = page_digests(data)
        at = slice(pages.start * DIGEST_BYTES, pages.end * DIGEST_BYTES)
        changed = differing(pages.start, self._digests[at], now)
        self._digests[at] = now
        self.changed_pages += len(changed)
        zero = {page for page in changed if _digest_at(now, page - pages.start) == ZERO_PAGE_DIGEST}
        for run in runs(zero):
            yield _zeros(run)
        for run in runs(page for page in changed if page not in zero):
            first = (run.start - pages.start) * PAGE_SIZE
            encoding, encoded = compress_pages(data[first : first + run.length_bytes], FAST_LEVEL)
            yield encode(Pages(REQUEST_ID, run, encoding, encoded))


def _digest_at(digests: bytes, index: int) -> bytes:
    return digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]


def _zeros(pages: PageRange) -> bytes:
    return encode(Pages(REQUEST_ID, pages, Encoding.ZERO))


def send(ram: RunningRam, write: Callable[[bytes], None], seconds: float) -> None:
    """Pass after pass, for so long at most."""
    ends = time.monotonic() + seconds
    while not ram.is_steady:
        began = time.process_time()
        for frame in ram.frames():
            if time.monotonic() > ends:
                return
            write(frame)
        pause = max(PAUSE_SECONDS, time.process_time() - began)
        if time.monotonic() + pause > ends:
            return
        time.sleep(pause)


def main(arguments: list[str]) -> int:
    path, seconds, niceness = Path(arguments[0]), float(arguments[1]), int(arguments[2])
    os.nice(niceness)  # not before all is imported
    try:
        with path.open("rb") as file, os.fdopen(1, "wb", buffering=0, closefd=False) as out:
            ram = RunningRam(file.fileno(), os.fstat(file.fileno()).st_size)
            send(ram, lambda frame: _write_all(out.fileno(), frame), seconds)
    except BrokenPipeError:
        pass  # nobody wants more
    except (OSError, ValueError) as error:
        print(f"lazymem send: --warm ends early: {error}", file=sys.stderr)
        return 1
    return 0


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
