"""The device state's pieces: whatever they are cut into, they come out as they were, and nonsense does not."""

from __future__ import annotations

import random
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis.strategies import binary, integers, lists

from lazymem.errors import SaveStreamError
from lazymem.handover.statepieces import MAX_PIECE_BYTES, Packer, Unpacker

SCREEN = bytes(range(256)) * (MAX_PIECE_BYTES // 256)
NOISE = random.Random(1).randbytes(MAX_PIECE_BYTES)


def lengths(length: int, packed: int) -> bytes:
    return struct.pack("<II", length, packed)


@given(lists(binary(min_size=1, max_size=3000), max_size=5), integers(1, 5000))
def test_what_goes_in_comes_out_however_it_is_cut(pieces: list[bytes], step: int) -> None:
    packer, unpacker = Packer(), Unpacker()
    sent = b"".join(map(packer.pack, pieces)) + packer.end()
    got = [piece for at in range(0, len(sent), step) for piece in unpacker.feed(sent[at : at + step])]
    assert got == pieces
    assert unpacker.ended


def test_a_screen_is_small_and_noise_no_larger_than_it_is() -> None:
    packer, unpacker = Packer(), Unpacker()
    screen, noise = packer.pack(SCREEN), packer.pack(NOISE)
    assert len(screen) < len(SCREEN) // 100
    assert len(noise) == len(NOISE) + 8
    assert list(unpacker.feed(screen + noise)) == [SCREEN, NOISE]
    assert not unpacker.ended


SMALL = zstandard.ZstdCompressor().compress(bytes(100))
HUGE = zstandard.ZstdCompressor().compress(bytes(64 << 20))
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))


@pytest.mark.parametrize(
    "data",
    [
        lengths(MAX_PIECE_BYTES + 1, 1),
        lengths(1, 2),
        lengths(1, 0),
        lengths(0, 1),
        lengths(2**32 - 1, 2**32 - 1),
        lengths(99, len(SMALL)) + SMALL,
        lengths(100, len(SMALL)) + SMALL[:-1] + b"x",
        lengths(100, len(SMALL) + 1) + SMALL + b"x",
        lengths(MAX_PIECE_BYTES, len(HUGE)) + HUGE,
        lengths(100, len(UNSIZED)) + UNSIZED,
        lengths(100, 4) + b"none",
        lengths(0, 0) + lengths(1, 1) + b"x",
    ],
)
def test_nonsense(data: bytes) -> None:
    with pytest.raises(SaveStreamError):
        list(Unpacker().feed(data))
