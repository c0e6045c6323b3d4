"""The working-set file: what was written is read, and everything else is refused with one line."""

from __future__ import annotations

import struct

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from lazymem.errors import SnapshotError
from lazymem.pages import PageRange
from lazymem.snapshot import workingset
from lazymem.snapshot.workingset import HEADER, MAX_BYTES, MAX_RUNS, WorkingSet, decode, encode, joined

IDENTITY = bytes(range(32))
TOTAL = 1 << 20

RECORDED = WorkingSet(IDENTITY, TOTAL, (PageRange(7, 3), PageRange(0, 1), PageRange(TOTAL - 9, 9)), 1.5)


def sealed(body: bytes) -> bytes:
    return body + blake3(body).digest(32)


def by_hand(runs: list[tuple[int, int]], count: int | None = None, total: int = TOTAL) -> bytes:
    """A file with a right checksum, whatever it says."""
    head = HEADER.pack(b"lazymws\n", 1, 0, 1500, total, len(runs) if count is None else count, IDENTITY)
    return sealed(head + b"".join(struct.pack("<Q", start << 16 | pages - 1) for start, pages in runs))


@st.composite
def working_sets(draw: st.DrawFn) -> WorkingSet:
    runs = []
    at = 0
    for gap, count in draw(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 200_000)), max_size=20)):
        runs.append(PageRange(at + gap, count))
        at += gap + count
    order = draw(st.permutations(runs))
    total = at + draw(st.integers(0 if at else 1, 5))
    return WorkingSet(draw(st.binary(min_size=32, max_size=32)), total, tuple(order), draw(st.integers(0, 9999)) / 1000)


@given(working_sets())
def test_what_was_encoded_is_decoded(recorded: WorkingSet) -> None:
    found = decode(encode(recorded), recorded.identity, recorded.total_pages)
    assert joined(found.runs) == joined(recorded.runs)
    assert found.seconds == recorded.seconds
    assert found.pages == recorded.pages


def test_the_bytes_are_those_of_the_document() -> None:
    assert encode(RECORDED) == by_hand([(7, 3), (0, 1), (TOTAL - 9, 9)])
    assert workingset.HEADER.size == 64


@pytest.mark.parametrize("length", range(len(encode(RECORDED))))
def test_every_cut_is_refused(length: int) -> None:
    with pytest.raises(SnapshotError, match="working set"):
        decode(encode(RECORDED)[:length], IDENTITY, TOTAL)


@given(st.integers(0, len(encode(RECORDED)) * 8 - 1))
def test_every_flipped_bit_is_refused(bit: int) -> None:
    data = bytearray(encode(RECORDED))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SnapshotError, match="working set"):
        decode(bytes(data), IDENTITY, TOTAL)


@given(st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError):
        decode(data, IDENTITY, TOTAL)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "0 bytes"),
        (bytes(MAX_BYTES + 1), f"{MAX_BYTES + 1} bytes"),
        (sealed(bytes(64)), "not one"),
        (sealed(HEADER.pack(b"lazymws\n", 2, 0, 0, TOTAL, 0, IDENTITY)), "version 2"),
        (sealed(HEADER.pack(b"lazymws\n", 1, 1, 0, TOTAL, 0, IDENTITY)), "cut or damaged"),
        (by_hand([(1, 1)], count=2**64 - 1), "cut or damaged"),
        (by_hand([(1, 1)], count=0), "cut or damaged"),
        (by_hand([(1, 1)])[:-1] + b"\0", "checksum"),
        (by_hand([(5, 10), (14, 1)]), "page 14 twice"),
        (by_hand([(5, 1), (5, 1)]), "page 5 twice"),
        (by_hand([(TOTAL - 1, 2)]), "beyond"),
        (by_hand([(2**48 - 1, 65536)]), "beyond"),
        (by_hand([(1, 1)], total=TOTAL + 1), "another snapshot"),
    ],
)
def test_nonsense_is_refused_with_one_line(data: bytes, text: str) -> None:
    with pytest.raises(SnapshotError, match=text) as caught:
        decode(data, IDENTITY, TOTAL)
    assert "\n" not in str(caught.value)


def test_another_snapshots_is_refused() -> None:
    with pytest.raises(SnapshotError, match="another snapshot"):
        decode(encode(RECORDED), bytes(32), TOTAL)


def test_the_latest_runs_of_too_many_are_left_out() -> None:
    runs = tuple(PageRange(at * 2, 1) for at in range(MAX_RUNS + 5))
    data = encode(WorkingSet(IDENTITY, TOTAL, runs))
    assert MAX_BYTES - 8 < len(data) <= MAX_BYTES
    assert decode(data, IDENTITY, TOTAL).runs == runs[:MAX_RUNS]


def test_long_runs_are_cut() -> None:
    data = encode(WorkingSet(IDENTITY, TOTAL, (PageRange(1, 70_000),)))
    assert decode(data, IDENTITY, TOTAL).runs == (PageRange(1, 65536), PageRange(65537, 70_000 - 65536))


def test_what_makes_no_sense_is_not_written() -> None:
    with pytest.raises(SnapshotError):
        encode(WorkingSet(IDENTITY, 10, (PageRange(9, 2),)))
    with pytest.raises(SnapshotError):
        encode(WorkingSet(b"short", 10, ()))
