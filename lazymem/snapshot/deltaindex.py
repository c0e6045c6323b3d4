"""`pc.ram.pages`: which pages of the RAM a delta holds, and where in its file each is. Bytes to record and back; pure.

A delta's `pc.ram.delta` holds whole pages one after the other, in ascending order of their numbers, nothing else: so
the runs of pages say where each one is.

    offset  bytes  field
    0       8      magic `lazymdp\\n`
    8       2      version, 1
    10      6      reserved, 0
    16      8      pages of the whole RAM
    24      8      number of runs
    32      32     identity of the snapshot that the delta makes of its parent (`Manifest.identity`)
    64      16 each runs: first page, number of pages; ascending, not overlapping
    then    32     BLAKE3 of everything before

All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from blake3 import blake3

from lazymem.digests import LEAF_PAGES
from lazymem.errors import SnapshotError
from lazymem.pages import PAGE_SIZE, PageRange

INDEX_NAME = "pc.ram.pages"

MAGIC = b"lazymdp\n"
VERSION = 1

HEADER = struct.Struct("<8sH6xQQ32s")
RUN = struct.Struct("<QQ")
CHECKSUM_BYTES = 32

_CHUNK_PAGES = 4096
"""Pages between two places that are known without counting: counting so many costs a microsecond."""


def max_file_bytes(total_pages: int) -> int:
    """What no index of so many pages exceeds: every second page is a run of its own."""
    return HEADER.size + (total_pages + 1) // 2 * RUN.size + CHECKSUM_BYTES


class DeltaIndex:
    """Which of `total_pages` pages a delta holds. Takes a byte of memory a page."""

    def __init__(self, total_pages: int, runs: Sequence[PageRange]) -> None:
        """`runs`: ascending, not overlapping.

        Raises:
            SnapshotError: they are not, or reach beyond the RAM.
        """
        self.total_pages = total_pages
        self.runs = tuple(runs)
        self.pages = sum(run.count for run in runs)
        self._held = bytearray(total_pages)
        self._before = [0] * (-(-total_pages // _CHUNK_PAGES) + 1)
        end = 0
        for run in runs:
            if run.start < end or run.end > total_pages:
                raise SnapshotError(f"{INDEX_NAME} has page {run.start} out of order, or beyond the RAM")
            end = run.end
            self._held[run.start : end] = b"\1" * run.count
            for piece in _by_chunk(run):
                self._before[piece.start // _CHUNK_PAGES + 1] += piece.count
        for chunk in range(1, len(self._before)):
            self._before[chunk] += self._before[chunk - 1]

    def __contains__(self, page: int) -> bool:
        return self._held[page] == 1

    def position(self, page: int) -> int:
        """How many of the delta's pages come before `page`: its place in the file, if it is there."""
        chunk = page // _CHUNK_PAGES
        return self._before[chunk] + self._held.count(1, chunk * _CHUNK_PAGES, page)

    def segments(self, pages: PageRange) -> Iterator[tuple[PageRange, int | None]]:
        """`pages` cut into runs that are the delta's, each with its byte offset in the file, or (None) are not."""
        start = pages.start
        while start < pages.end:
            own = self._held[start] == 1
            end = self._held.find(0 if own else 1, start, pages.end)
            end = pages.end if end < 0 else end
            yield PageRange(start, end - start), self.position(start) * PAGE_SIZE if own else None
            start = end

    def leaves(self) -> list[int]:
        """The leaves of the digest tree that have a page here, ascending."""
        found: dict[int, None] = {}
        for run in self.runs:
            found.update(dict.fromkeys(range(run.start // LEAF_PAGES, (run.end - 1) // LEAF_PAGES + 1)))
        return list(found)


def encode(index: DeltaIndex, identity: bytes) -> bytes:
    """The file's bytes. `identity`: of the snapshot that the delta makes of its parent."""
    head = HEADER.pack(MAGIC, VERSION, index.total_pages, len(index.runs), identity)
    body = b"".join([head, *(RUN.pack(run.start, run.count) for run in index.runs)])
    return body + blake3(body).digest(CHECKSUM_BYTES)


def decode(data: bytes, identity: bytes, total_pages: int) -> DeltaIndex:
    """What `data` says of the delta that makes the snapshot `identity`, of so many pages.

    Raises:
        SnapshotError: one line that says why it is of no use.
    """
    if len(data) < HEADER.size + CHECKSUM_BYTES:
        raise SnapshotError(f"{INDEX_NAME} is cut: it has {len(data)} bytes")
    magic, version, pages, count, bound_to = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise SnapshotError(f"{INDEX_NAME} is not one: its first bytes are others")
    if version != VERSION:
        raise SnapshotError(f"{INDEX_NAME} has version {version}, and only {VERSION} is known here")
    if len(data) != HEADER.size + count * RUN.size + CHECKSUM_BYTES:
        raise SnapshotError(f"{INDEX_NAME} is cut or damaged: {len(data)} bytes for {count} runs")
    if blake3(data[:-CHECKSUM_BYTES]).digest(CHECKSUM_BYTES) != data[-CHECKSUM_BYTES:]:
        raise SnapshotError(f"{INDEX_NAME} is damaged: its checksum is another")
    if bound_to != identity or pages != total_pages:
        raise SnapshotError(f"{INDEX_NAME} is of another snapshot than its manifest")
    found = list(RUN.iter_unpack(data[HEADER.size : -CHECKSUM_BYTES]))
    if any(not length or start + length > total_pages for start, length in found):
        raise SnapshotError(f"{INDEX_NAME} has a run outside of the RAM's {total_pages} pages")
    return DeltaIndex(total_pages, [PageRange(start, length) for start, length in found])


def _by_chunk(run: PageRange) -> Iterator[PageRange]:
    start = run.start
    while start < run.end:
        end = min(run.end, (start // _CHUNK_PAGES + 1) * _CHUNK_PAGES)
        yield PageRange(start, end - start)
        start = end
