"""Pieces with candidates in them come out as they went in, and what names pages that are not there does not."""

from __future__ import annotations

import random
import struct
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis.strategies import binary, integers, lists, sampled_from, tuples

from lazymem.errors import SaveStreamError
from lazymem.handover.candidates import MOST_BYTES, Candidates, Reference, cut_out
from lazymem.handover.pagerecords import Block
from lazymem.handover.screenstream import ScreenStream
from lazymem.handover.statepieces import MAX_PIECE_BYTES, Packer, Unpacker
from lazymem.pages import PAGE_SIZE
from tests.support.ramstream import beginning, one_pass

DISPLAY = Block(b"0000:00:02.0/vga.vram", 16 << 20, 0xFD000000)
FIRMWARE = Block(b"pc.bios", 256 << 10, 0xFFFC0000)
NEAR_END = (256 - 96) << 10
PAGES = [random.Random(n).randbytes(PAGE_SIZE) for n in range(3)] + [b"\0" * PAGE_SIZE]

CANDIDATES, REFERRING = 3, 4

some_pages = lists(tuples(integers(0, 20), sampled_from(PAGES)), max_size=30)


def at_offsets(pages: list[tuple[int, bytes]], block: bytes = DISPLAY.name) -> list[tuple[bytes, int, bytes | None]]:
    return [(block, number * PAGE_SIZE, data) for number, data in pages]


@given(some_pages, some_pages, some_pages, integers(1, 40_000), binary(max_size=5000), integers(1, 30_000))
def test_the_destination_gets_what_the_emulator_sent(
    first: list[tuple[int, bytes]],
    candidates: list[tuple[int, bytes]],
    last: list[tuple[int, bytes]],
    step: int,
    devices: bytes,
    arrives: int,
) -> None:
    """Whatever the candidates are, and however the stream is cut on its way in and out."""
    screen, packer, unpacker = ScreenStream(), Packer(), Unpacker()
    screen.watch([(DISPLAY.address, DISPLAY.size)])
    running = one_pass([*at_offsets(first), (FIRMWARE.name, NEAR_END, PAGES[0])], is_last=False)
    stream = beginning([DISPLAY, FIRMWARE]) + running + one_pass(at_offsets(last), is_last=True) + b"\4" + devices
    sent = bytearray()
    for number, data in candidates:
        screen.candidates.keep(number * PAGE_SIZE, data)
        sent += packer.pack_candidates(number * PAGE_SIZE, data)
    referred = 0
    at = 0
    while at < len(stream):
        taken = stream[at : at + min(step, screen.room)]
        at += len(taken)
        data, found = screen.take(taken)
        referred += len(found)
        if data:
            sent += packer.pack_referring(data, found) if found else packer.pack(data)
    if rest := screen.rest():
        sent += packer.pack(rest)
    sent += packer.end()
    got = [piece for at in range(0, len(sent), arrives) for piece in unpacker.feed(bytes(sent[at : at + arrives]))]
    assert b"".join(got) == stream
    assert unpacker.ended
    kept = dict(candidates)
    assert referred == sum(kept.get(number) == data for number, data in last)
    assert screen.is_past is bool(first)


def test_without_a_display_all_goes_by_as_it_comes() -> None:
    screen = ScreenStream()
    assert screen.take(b"QEVM") == (b"QEVM", [])
    assert (screen.room, screen.rest()) == (MAX_PIECE_BYTES, b"")


def test_a_display_that_no_block_is_behind_is_never_past() -> None:
    screen = ScreenStream()
    screen.watch([(DISPLAY.address, DISPLAY.size)])
    screen.take(beginning([FIRMWARE, DISPLAY]) + one_pass(at_offsets([(0, PAGES[0])]), is_last=False))
    assert screen.display is None
    assert not screen.is_past


def test_a_screen_that_is_at_the_destination_costs_next_to_nothing() -> None:
    packer = Packer()
    data = b"".join(struct.pack(">Q", n * PAGE_SIZE | 0x28) + PAGES[n % 3] for n in range(60))
    found = [Reference(n * (PAGE_SIZE + 8) + 8, n * PAGE_SIZE) for n in range(60)]
    assert len(packer.pack_referring(data, found)) < 1000 < len(packer.pack(data)) // 10


def referring(length: int, entries: list[tuple[int, int]], rest: bytes, *, count: int | None = None) -> bytes:
    table = b"".join(struct.pack("<II", *entry) for entry in entries)
    content = struct.pack("<I", len(entries) if count is None else count) + table + simple(rest)
    return struct.pack("<BII", REFERRING, length, len(content)) + content


def simple(data: bytes, form: int = 0) -> bytes:
    return struct.pack("<BII", form, len(data), len(data)) + data


def candidates(offset: int, data: bytes, *, length: int | None = None, form: int = 0) -> bytes:
    content = struct.pack("<I", offset) + simple(data, form)
    return struct.pack("<BII", CANDIDATES, len(data) if length is None else length, len(content)) + content


PAGE = PAGES[0]
KEPT = candidates(PAGE_SIZE, PAGE)


@pytest.mark.parametrize(
    "data",
    [
        candidates(1, PAGE),
        candidates(0, PAGE[1:]),
        candidates(MOST_BYTES, PAGE),
        candidates(2**32 - PAGE_SIZE, PAGE),
        candidates(0, PAGE, length=2 * PAGE_SIZE),
        candidates(0, PAGE, form=CANDIDATES),
        candidates(0, PAGE, form=REFERRING),
        candidates(0, PAGE, form=1),
        struct.pack("<BIII", CANDIDATES, 4096, 4, 0),
        struct.pack("<BII", CANDIDATES, MAX_PIECE_BYTES + 1, 100),
        struct.pack("<BII", CANDIDATES, 4096, 2 * MAX_PIECE_BYTES),
        struct.pack("<BII", REFERRING, 4096, 2 * MAX_PIECE_BYTES),
        struct.pack("<BII", REFERRING, 0, 100),
        struct.pack("<BII", REFERRING, MAX_PIECE_BYTES + 1, 100),
        struct.pack("<BIIH", REFERRING, 4096, 2, 0),
        struct.pack("<BIII", REFERRING, 4096, 4, 2**32 - 1),
        referring(PAGE_SIZE + 8, [(8, 0)], bytes(8)),
        referring(PAGE_SIZE + 8, [(8, PAGE_SIZE + 1)], bytes(8)),
        referring(PAGE_SIZE + 8, [(9, PAGE_SIZE)], bytes(8)),
        referring(PAGE_SIZE + 9, [(8, PAGE_SIZE)], bytes(8)),
        referring(2 * PAGE_SIZE, [(8, PAGE_SIZE)], bytes(8)),
        referring(2 * PAGE_SIZE + 8, [(8, PAGE_SIZE), (9, PAGE_SIZE)], bytes(8)),
        referring(2 * PAGE_SIZE + 8, [(8 + PAGE_SIZE, PAGE_SIZE), (0, PAGE_SIZE)], bytes(8)),
        referring(PAGE_SIZE + 8, [(8, PAGE_SIZE)], bytes(8), count=2),
        referring(PAGE_SIZE + 8, [(8, PAGE_SIZE)], bytes(8), count=0),
    ],
)
def test_nonsense(data: bytes) -> None:
    unpacker = Unpacker()
    assert list(unpacker.feed(KEPT)) == []
    with pytest.raises(SaveStreamError):
        list(unpacker.feed(data))


def test_a_table_of_more_pages_than_the_piece_has_is_no_reason_to_put_them_together() -> None:
    """It takes 8 bytes to name one."""
    count = MAX_PIECE_BYTES // 8
    data = referring(PAGE_SIZE + 8, [(8 + n * PAGE_SIZE, PAGE_SIZE) for n in range(count)], bytes(8))
    unpacker = Unpacker()
    assert list(unpacker.feed(KEPT)) == []
    tracemalloc.start()
    try:
        with pytest.raises(SaveStreamError):
            list(unpacker.feed(data))
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_PIECE_BYTES
    finally:
        tracemalloc.stop()


def test_what_the_nonsense_is_made_of_makes_sense() -> None:
    unpacker = Unpacker()
    assert list(unpacker.feed(KEPT + referring(PAGE_SIZE + 8, [(8, PAGE_SIZE)], b"a" * 8))) == [b"a" * 8 + PAGE]


@given(some_pages, integers(0, 3000), binary(min_size=1, max_size=4))
def test_damaged_pieces_are_refused_or_mean_something_else(
    pages: list[tuple[int, bytes]], at: int, damage: bytes
) -> None:
    """And nothing but that: no other error, and no more memory than pieces and candidates have."""
    sent = KEPT + b"".join(referring(PAGE_SIZE + 8, [(8, n * PAGE_SIZE)], bytes(8)) for n, _ in pages)
    damaged = sent[:at] + damage + sent[at + len(damage) :]
    unpacker = Unpacker()
    with suppress(SaveStreamError):
        assert all(len(piece) <= MAX_PIECE_BYTES for piece in unpacker.feed(damaged))


def test_a_table_of_nothing_but_pages_is_not_put_together_first() -> None:
    """It would be 128 MiB, of a piece that says that it has 256 KiB."""
    entries = [(number * PAGE_SIZE, PAGE_SIZE) for number in range(MAX_PIECE_BYTES // 8)]
    unpacker = Unpacker()
    assert list(unpacker.feed(KEPT)) == []
    sent = referring(MAX_PIECE_BYTES, entries, b"a")
    tracemalloc.start()
    try:
        with pytest.raises(SaveStreamError):
            list(unpacker.feed(sent))
        assert tracemalloc.get_traced_memory()[1] < 16 * MAX_PIECE_BYTES
    finally:
        tracemalloc.stop()


def test_a_later_candidate_is_instead_of_an_earlier_one() -> None:
    kept = Candidates()
    kept.keep(0, PAGES[0] + PAGES[1])
    kept.keep(0, PAGES[2])
    assert len(kept) == 2
    assert kept.is_equal(0, b"x" + PAGES[2], 1)
    assert not kept.is_equal(0, b"x" + PAGES[0], 1)
    assert not kept.is_equal(8192, PAGES[0], 0)
    table, rest = cut_out(b"ab" + PAGES[2] + b"c" + PAGES[1], [Reference(2, 0), Reference(3 + PAGE_SIZE, PAGE_SIZE)])
    assert rest == b"abc"
    whole = b"ab" + PAGES[2] + b"c" + PAGES[1]
    assert kept.put_together(table, rest, len(whole)) == whole
