"""The device state's pieces: whatever they are cut into, they come out as they were, and nonsense does not."""

from __future__ import annotations

import random
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis.strategies import binary, booleans, integers, lists, tuples

from lazymem.errors import SaveStreamError
from lazymem.handover.planes import Planes
from lazymem.handover.statepieces import MAX_PIECE_BYTES, Packer, Unpacker

AS_IT_IS, ZSTD, PLANES = range(3)

WIDTH = 1024
PAGE = 4096


def in_pages(screen: bytes) -> bytes:
    """As an emulator's stream has it: a header of 8 bytes in front of each page."""
    return b"".join(struct.pack(">Q", at | 8) + screen[at : at + PAGE] for at in range(0, len(screen), PAGE))


def picture() -> bytes:
    """Slopes of colour with a camera's noise in the lowest bits."""
    noise = random.Random(2)
    lines = MAX_PIECE_BYTES // 4 // WIDTH
    pixels = [(x * 3 + y * 2, x * x + y * y >> 12, x * y >> 11) for y in range(lines) for x in range(WIDTH)]
    return in_pages(bytes(v for r, g, b in pixels for v in (*(c & 0xFC | noise.getrandbits(2) for c in (b, g, r)), 0)))


def console() -> bytes:
    """Characters of 8 x 16 pixels in one colour."""
    choose = random.Random(4)
    lit, dark = struct.pack("<I", 0x00C0C0C0), struct.pack("<I", 0x00101820)
    glyphs = [[choose.getrandbits(8) for _ in range(8)] for _ in range(36)]
    rows: list[bytes] = []
    for _ in range(MAX_PIECE_BYTES // 4 // WIDTH // 16):
        text = [choose.choice(glyphs) for _ in range(WIDTH // 8)]
        rows += [lit if glyph[y // 2] >> x & 1 else dark for y in range(16) for glyph in text for x in range(8)]
    return in_pages(b"".join(rows))


SCREEN = bytes(range(256)) * (MAX_PIECE_BYTES // 256)
NOISE = random.Random(1).randbytes(MAX_PIECE_BYTES)
PICTURE, CONSOLE = picture(), console()


def header(form: int, length: int, packed: int) -> bytes:
    return struct.pack("<BII", form, length, packed)


def sent_form(data: bytes) -> int:
    """Of one piece, which has to come back."""
    packed = Packer().pack(data)
    assert list(Unpacker().feed(packed)) == [data]
    return packed[0]


parts = tuples(booleans(), integers(0, MAX_PIECE_BYTES - 30_000), integers(1, 30_000)).map(
    lambda found: (PICTURE if found[0] else CONSOLE)[found[1] : found[1] + found[2]]
)
"""Any length, and anywhere in a pixel."""


@given(lists(binary(min_size=1, max_size=3000) | parts, max_size=5), integers(1, 5000))
def test_what_goes_in_comes_out_however_it_is_cut(pieces: list[bytes], step: int) -> None:
    packer, unpacker = Packer(), Unpacker()
    sent = b"".join(map(packer.pack, pieces)) + packer.end()
    got = [piece for at in range(0, len(sent), step) for piece in unpacker.feed(sent[at : at + step])]
    assert b"".join(got) == b"".join(pieces)
    assert unpacker.ended


def test_what_came_as_it_is_goes_on_as_it_comes() -> None:
    """An emulator has its first pages in hand while the last ones are on the link."""
    packer, unpacker = Packer(), Unpacker()
    sent = packer.pack(NOISE) + packer.pack(SCREEN)
    got = [list(unpacker.feed(sent[at : at + 1009])) for at in range(0, len(NOISE), 1009)]
    assert all(len(found) == 1 for found in got)
    assert b"".join(found for (found,) in got) == NOISE[: len(got) * 1009 - 9]


def test_a_screen_is_small_and_noise_no_larger_than_it_is() -> None:
    packer, unpacker = Packer(), Unpacker()
    screen, noise = packer.pack(SCREEN), packer.pack(NOISE)
    assert len(screen) < len(SCREEN) // 100
    assert len(noise) == len(NOISE) + 9
    assert list(unpacker.feed(screen + noise)) == [SCREEN, NOISE]
    assert not unpacker.ended


@pytest.mark.parametrize("cut", range(4))
def test_each_piece_goes_in_the_form_that_suits_it(cut: int) -> None:
    """Wherever in a pixel it begins, and one after the other of one packer."""
    packer = Packer()
    picture, console, noise = (data[cut:MAX_PIECE_BYTES] for data in (PICTURE, CONSOLE, NOISE))
    forms = [packer.pack(data)[0] for data in (picture, console, noise, picture, console)]
    assert forms == [PLANES, ZSTD, AS_IT_IS, PLANES, ZSTD]


def test_a_picture_is_less_than_half_of_what_zstd_makes_of_it() -> None:
    picture = PICTURE[:MAX_PIECE_BYTES]
    assert len(Packer().pack(picture)) < len(zstandard.ZstdCompressor(level=1).compress(picture)) // 2


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8191, 8192, 8193, MAX_PIECE_BYTES - 1, MAX_PIECE_BYTES])
def test_any_length(length: int) -> None:
    assert sent_form(PICTURE[:length]) == (AS_IT_IS if length < 10 else PLANES if length >= 8192 else ZSTD)


SMALL = zstandard.ZstdCompressor().compress(bytes(100))
HUGE = zstandard.ZstdCompressor().compress(bytes(64 << 20))
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))


IN_PLANES = zstandard.ZstdCompressor().compress(Planes(100).take_apart(bytes(100)))


@pytest.mark.parametrize(
    "data",
    [
        header(ZSTD, MAX_PIECE_BYTES + 1, 1),
        header(PLANES, MAX_PIECE_BYTES + 1, 1),
        header(AS_IT_IS, MAX_PIECE_BYTES + 1, MAX_PIECE_BYTES + 1),
        header(ZSTD, 1, 2),
        header(ZSTD, 2, 2),
        header(PLANES, 2, 2),
        header(AS_IT_IS, 2, 1),
        header(ZSTD, 1, 0),
        header(ZSTD, 0, 0),
        header(PLANES, 0, 0),
        header(AS_IT_IS, 0, 1),
        header(5, 100, len(SMALL)) + SMALL,
        header(255, 0, 0),
        header(AS_IT_IS, 2**32 - 1, 2**32 - 1),
        header(ZSTD, 99, len(SMALL)) + SMALL,
        header(PLANES, 99, len(IN_PLANES)) + IN_PLANES,
        header(PLANES, 101, len(IN_PLANES)) + IN_PLANES,
        header(ZSTD, 100, len(SMALL)) + SMALL[:-1] + b"x",
        header(ZSTD, 100, len(SMALL) + 1) + SMALL + b"x",
        header(ZSTD, MAX_PIECE_BYTES, len(HUGE)) + HUGE,
        header(PLANES, MAX_PIECE_BYTES, len(HUGE)) + HUGE,
        header(ZSTD, 100, len(UNSIZED)) + UNSIZED,
        header(PLANES, 100, len(UNSIZED)) + UNSIZED,
        header(ZSTD, 100, 4) + b"none",
        header(PLANES, 100, 4) + b"none",
        header(AS_IT_IS, 0, 0) + header(AS_IT_IS, 1, 1) + b"x",
    ],
)
def test_nonsense(data: bytes) -> None:
    with pytest.raises(SaveStreamError):
        list(Unpacker().feed(data))


def test_what_the_nonsense_is_made_of_makes_sense() -> None:
    zeros = header(ZSTD, 100, len(SMALL)) + SMALL + header(PLANES, 100, len(IN_PLANES)) + IN_PLANES
    assert list(Unpacker().feed(zeros)) == [bytes(100)] * 2
