"""The `working-set` file: which pages a resume touched, in order of first touch. Bytes to record and back; pure.

A recording is a hint. It says in which order pages are worth fetching, never what is in them, so a wrong one costs
time only; what is damaged, of another snapshot, or makes no sense is refused whole.

    offset  bytes  field
    0       8      magic `lazymws\\n`
    8       2      version, 1
    10      2      reserved, 0
    12      4      how long was recorded, in milliseconds
    16      8      pages of the RAM
    24      8      number of runs
    32      32     identity of the snapshot (`Manifest.identity`, which stands for the digest tree's root)
    64      8 each runs: first page times 65536, plus the number of pages less 1
    then    32     BLAKE3 of everything before

All numbers are little-endian. Runs do not overlap, and lie inside the RAM.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise

from blake3 import blake3
from msgspec import Struct

from lazymem.errors import SnapshotError
from lazymem.pages import PageRange

WORKING_SET_NAME = "working-set"

MAGIC = b"lazymws\n"
VERSION = 1

HEADER = struct.Struct("<8sHHIQQ32s")
RUN_BYTES = 8
CHECKSUM_BYTES = 32
IDENTITY_BYTES = 32

MAX_BYTES = 1 << 20
"""What anybody writes, reads, takes or sends: it is fetched before the first guess, and takes 84 ms of 100 Mb/s."""

MAX_RUNS = (MAX_BYTES - HEADER.size - CHECKSUM_BYTES) // RUN_BYTES
"""131,060: 16 GiB in requests of 128 KiB, no two of them neighbours."""

MAX_RUN_PAGES = 1 << 16


class WorkingSet(Struct, frozen=True):
    """`runs`: in order of first touch, not overlapping, inside `total_pages`. `seconds`: how long was recorded."""

    identity: bytes
    total_pages: int
    runs: tuple[PageRange, ...]
    seconds: float = 0.0

    @property
    def pages(self) -> int:
        return sum([run.count for run in self.runs])


def encode(recorded: WorkingSet) -> bytes:
    """The file's bytes. Of more than `MAX_RUNS` runs the latest are left out.

    Raises:
        SnapshotError: the record itself makes no sense.
    """
    runs = [piece for run in recorded.runs[: MAX_RUNS + 1] for piece in run.pieces(MAX_RUN_PAGES)][:MAX_RUNS]
    _check_runs(runs, recorded.total_pages)
    if len(recorded.identity) != IDENTITY_BYTES:
        raise SnapshotError(f"a working set's identity has {IDENTITY_BYTES} bytes, not {len(recorded.identity)}")
    words = _little_endian(array("Q", [run.start << 16 | run.count - 1 for run in runs]))
    milliseconds = min(2**32 - 1, max(0, round(recorded.seconds * 1000)))
    head = HEADER.pack(MAGIC, VERSION, 0, milliseconds, recorded.total_pages, len(runs), recorded.identity)
    body = head + words.tobytes()
    return body + blake3(body).digest(CHECKSUM_BYTES)


def decode(data: bytes, identity: bytes, total_pages: int) -> WorkingSet:
    """What `data` says of the snapshot with this `identity` and so many pages.

    Raises:
        SnapshotError: one line that says why it is of no use.
    """
    if not HEADER.size + CHECKSUM_BYTES <= len(data) <= MAX_BYTES:
        raise SnapshotError(f"the working set has {len(data)} bytes, which is none of at most {MAX_BYTES}")
    magic, version, reserved, milliseconds, pages, count, bound_to = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise SnapshotError("the working set is not one: its first bytes are others")
    if version != VERSION:
        raise SnapshotError(f"the working set has version {version}, and only {VERSION} is known here")
    if reserved or len(data) != HEADER.size + count * RUN_BYTES + CHECKSUM_BYTES:
        raise SnapshotError(f"the working set is cut or damaged: {len(data)} bytes for {count} runs")
    if blake3(data[:-CHECKSUM_BYTES]).digest(CHECKSUM_BYTES) != data[-CHECKSUM_BYTES:]:
        raise SnapshotError("the working set is damaged: its checksum is another")
    if bound_to != identity or pages != total_pages:
        raise SnapshotError("the working set is of another snapshot")
    words = array("Q", data[HEADER.size : -CHECKSUM_BYTES])
    runs = [PageRange(word >> 16, (word & 0xFFFF) + 1) for word in _little_endian(words)]
    _check_runs(runs, total_pages)
    return WorkingSet(identity, total_pages, tuple(runs), milliseconds / 1000)


def _check_runs(runs: Sequence[PageRange], total_pages: int) -> None:
    for before, after in pairwise(sorted(runs)):
        if after.start < before.end:
            raise SnapshotError(f"the working set has page {after.start} twice")
    if max((run.end for run in runs), default=0) > total_pages:
        raise SnapshotError(f"the working set goes beyond the RAM's {total_pages} pages")


def joined(runs: Iterable[PageRange]) -> tuple[PageRange, ...]:
    """The same pages in the same order, with each run that goes on where the one before ended made one with it."""
    found: list[PageRange] = []
    for run in runs:
        if found and found[-1].end == run.start:
            found[-1] = PageRange(found[-1].start, found[-1].count + run.count)
        else:
            found.append(run)
    return tuple(found)


def _little_endian(words: array[int]) -> array[int]:
    if sys.byteorder == "big":
        words.byteswap()
    return words
