"""How page data is encoded, and that a hostile zstd frame gets nothing but an error."""

from __future__ import annotations

import os
import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.errors import RemoteProtocolError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire.messages import Capability, Encoding, Pages
from lazymem.wire.pagedata import decode_pages, encode_pages

TEXT = (b"guest memory is text now and then. " * 200)[:PAGE_SIZE]


def pages(encoding: Encoding, data: bytes | memoryview, count: int = 1) -> Pages:
    return Pages(1, PageRange(0, count), encoding, data)


@pytest.mark.parametrize("count", [1, 3, 256])
@pytest.mark.parametrize("kind", ["zero", "text", "random", "nearly zero"])
@pytest.mark.parametrize("capability", [Capability.NONE, Capability.ZSTD])
def test_round_trip(count: int, kind: str, capability: Capability) -> None:
    data = {
        "zero": bytes(count * PAGE_SIZE),
        "text": TEXT * count,
        "random": os.urandom(count * PAGE_SIZE),
        "nearly zero": bytes(count * PAGE_SIZE - 1) + b"\x01",
    }[kind]
    encoding, encoded = encode_pages(memoryview(data), capability)
    if kind == "zero":
        assert (encoding, encoded) == (Encoding.ZERO, b"")
    elif kind == "random" or capability == Capability.NONE:
        assert encoding == Encoding.RAW
    else:
        assert encoding == Encoding.ZSTD
        assert len(encoded) < len(data) // 2
    decoded = decode_pages(pages(encoding, encoded, count))
    assert (bytes(len(data)) if decoded is None else bytes(decoded)) == data


def test_a_saving_of_less_than_an_eighth_is_not_worth_it() -> None:
    data = os.urandom(PAGE_SIZE - PAGE_SIZE // 10) + bytes(PAGE_SIZE // 10)
    assert encode_pages(data, Capability.ZSTD) == (Encoding.RAW, data)


def bomb() -> bytes:
    """256 MiB of zeros in some KiB, with its true size in the frame."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=256 << 20)
    return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(256)) + compressor.flush()


def without_size(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=False).compress(data)


def lying(data: bytes, claimed: int) -> bytes:
    """A frame whose header claims another size than it has. The size field of a 4 KiB frame is 2 bytes, 256 less."""
    frame = bytearray(zstandard.ZstdCompressor(level=1).compress(data))
    at = frame.index(((len(data) - 256) & 0xFFFF).to_bytes(2, "little"))
    frame[at : at + 2] = (claimed - 256).to_bytes(2, "little")
    assert zstandard.frame_content_size(bytes(frame)) == claimed
    return bytes(frame)


GOOD = zstandard.ZstdCompressor(level=1).compress(TEXT)

HOSTILE = {
    "a bomb": bomb(),
    "no size": without_size(TEXT),
    "two pages": zstandard.ZstdCompressor(level=1).compress(TEXT * 2),
    "a byte less": zstandard.ZstdCompressor(level=1).compress(TEXT[:-1]),
    "holds less than it claims": lying(TEXT[:-96], PAGE_SIZE),
    "holds more than it claims": lying(TEXT + TEXT[:96], PAGE_SIZE),
    "cut": GOOD[:-5],
    "bytes behind": GOOD + b"x",
    "a second frame": GOOD + GOOD,
    "a skippable frame": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",
    "not zstd": b"\x28\xb5\x2f\xfe" + GOOD[4:],
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_are_refused_before_memory_is_spent(name: str) -> None:
    message = pages(Encoding.ZSTD, HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode_pages(message)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_raw_data_of_the_wrong_length() -> None:
    with pytest.raises(RemoteProtocolError):
        decode_pages(pages(Encoding.RAW, bytes(PAGE_SIZE - 1)))


@settings(max_examples=200)
@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_altered_frames_decode_to_a_page_or_are_refused(flips: list[tuple[int, int]]) -> None:
    frame = bytearray(GOOD)
    for at, change in flips:
        frame[at] ^= change
    try:
        data = decode_pages(pages(Encoding.ZSTD, bytes(frame)))
    except RemoteProtocolError:
        return
    assert data is not None
    assert len(data) == PAGE_SIZE
