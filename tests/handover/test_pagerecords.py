"""Pages are found in an emulator's stream however it is cut, and what is no such stream goes by as it is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis.strategies import binary, integers, lists, sampled_from, tuples

from lazymem.handover.pagerecords import Block, PageRecords
from lazymem.pages import PAGE_SIZE
from tests.support.ramstream import END_OF_PASS, beginning, one_pass

BLOCKS = (Block(b"pc.ram", 512 << 20, 0), Block(b"vga.vram", 16 << 20, 0xFD000000), Block(b"pc.bios", 1 << 18, 0))
DEVICES = b"\x04" + bytes(range(256)) * 600

pages = lists(
    tuples(
        sampled_from([block.name for block in BLOCKS[1:]]),
        integers(0, 63).map(lambda number: number * PAGE_SIZE),
        sampled_from([None, None, b"a" * PAGE_SIZE, bytes(range(256)) * 16]),
    ),
    max_size=40,
)


def found_in(stream: bytes, step: int) -> tuple[PageRecords, list[tuple[bytes, int, bytes, bool]], bytes]:
    """Fed piece by piece: block, offset, bytes, whether in the last pass; and all that was read."""
    records, found, unread, read = PageRecords(), [], b"", b""
    for at in range(0, len(stream), step):
        data = unread + stream[at : at + step]
        done, pages = records.feed(data)
        for page in pages:
            assert page.at + PAGE_SIZE <= done
            found.append((page.block, page.offset, data[page.at : page.at + PAGE_SIZE], page.is_last))
        read, unread = read + data[:done], data[done:]
    return records, found, read + unread


@given(pages, pages, integers(1, 20_000))
@example([], [(b"vga.vram", 0, b"a" * PAGE_SIZE)], 1)
def test_each_page_is_found_once_however_the_stream_is_cut(
    first: list[tuple[bytes, int, bytes | None]], last: list[tuple[bytes, int, bytes | None]], step: int
) -> None:
    command = struct.pack(">BHH", 8, 11, 3) + b"abc"
    passes = one_pass(first, is_last=False) + command + one_pass(last, is_last=True)
    stream = beginning(BLOCKS) + passes + DEVICES
    records, found, read = found_in(stream, step)
    assert records.blocks == BLOCKS
    sent = [(*page, False) for page in first] + [(*page, True) for page in last]
    assert found == [page for page in sent if page[2] is not None]
    assert records.is_over
    assert read == stream


@given(binary(max_size=300), integers(0, 400), integers(1, 300))
def test_nonsense_goes_by(nonsense: bytes, at: int, step: int) -> None:
    """Also in the midst of a stream."""
    whole = beginning(BLOCKS) + one_pass([(b"vga.vram", 0, None)] * 20, is_last=True)
    stream = whole[:at] + nonsense + whole[at:]
    _, _, read = found_in(stream, step)
    assert read == stream


@pytest.mark.parametrize("length", [127 << 10, 129 << 10])
def test_what_is_no_stream_is_not_kept_for_ever(length: int) -> None:
    records = PageRecords()
    done, _ = records.feed(bytes(length))
    assert (done, records.is_over) == ((length, True) if length > 128 << 10 else (0, False))


@pytest.mark.parametrize("flags", [0x04, 0x40, 0x80, 0x100, 0x800, 0x18])
def test_a_record_that_nobody_here_knows_ends_it(flags: int) -> None:
    stream = (
        beginning(BLOCKS) + one_pass([], is_last=False)[: -len(END_OF_PASS)] + struct.pack(">QB", flags, 3) + b"abc"
    )
    records = PageRecords()
    assert records.feed(stream) == (len(stream), [])
    assert records.is_over


def test_another_sections_end_ends_it() -> None:
    stream = beginning(BLOCKS) + one_pass([], is_last=False)[:-1] + b"\x09"
    records = PageRecords()
    assert records.feed(stream) == (len(stream), [])
    assert records.is_over


def test_a_list_of_blocks_that_takes_no_end_is_given_up() -> None:
    """Each of no bytes, under a total that they never come to."""
    stream = beginning([Block(b"a", 1 << 40, 0)]).replace(struct.pack(">Q", 1 << 40), bytes(8)) + bytes(1 << 18)
    records = PageRecords()
    assert records.feed(stream)[0] == len(stream)
    assert records.is_over
