"""Clients that look at frame heads only: whatever pieces the socket gives, and against a real server."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.images import synthetic
from bench.lazymemways import client_tls, serve_lazymem
from bench.way import VARIANTS
from bench.wireclients import FrameHeads, demand, read
from lazymem.digests import DIGEST_BYTES
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire.codec import encode
from lazymem.wire.frame import FrameType
from lazymem.wire.messages import Digests, Encoding, Level, Message, Pages, Ping

FRAMES: list[tuple[Message, tuple[int, bool, int]]] = [
    (Pages(1, PageRange(5, 2), Encoding.RAW, bytes(range(256)) * 32), (FrameType.PAGES, False, 2)),
    (Digests(1, Level.LEAF, 3, bytes(256 * DIGEST_BYTES)), (FrameType.DIGESTS, False, 0)),
    (Ping(7), (FrameType.PING, False, 0)),
    (Pages(2, PageRange(0, 200), Encoding.ZERO), (FrameType.PAGES, False, 200)),
    (Pages(2, PageRange(200, 1), Encoding.RAW, b"\1" * PAGE_SIZE, final=True), (FrameType.PAGES, True, 1)),
]


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=60))
def test_frames_are_the_same_in_whatever_pieces_they_come(lengths: list[int]) -> None:
    stream = b"".join(encode(message) for message, _ in FRAMES)
    heads, at = FrameHeads(), 0
    found: list[tuple[int, bool, int]] = []
    for length in [*lengths, len(stream)]:
        found += heads.feed(stream[at : at + length])
        at += length
    assert found == [expected for _, expected in FRAMES]


def test_frames_byte_by_byte() -> None:
    stream = b"".join(encode(message) for message, _ in FRAMES)
    heads = FrameHeads()
    assert [found for byte in stream for found in heads.feed(bytes([byte]))] == [expected for _, expected in FRAMES]


@pytest.mark.system
def test_a_real_server_answers_them(tmp_path: Path) -> None:
    image = synthetic(tmp_path / "work", 8)
    with serve_lazymem(image, tmp_path) as server:
        found = read(server.address, 2, 3.0)
        waits = demand(server.address, 1.0)["waits"]
    assert len(found["pages"]) == 2
    assert all(pages > 0 for pages in found["pages"])
    assert waits


@pytest.mark.system
def test_they_speak_tls_too(tmp_path: Path) -> None:
    image = synthetic(tmp_path / "work", 8)
    (variant,) = [variant for variant in VARIANTS if variant.suffix == "+tls"]
    with serve_lazymem(image, tmp_path, variant) as server:
        found = read(server.address, 2, 3.0, client_tls(tmp_path))
        waits = demand(server.address, 1.0, client_tls(tmp_path))["waits"]
    assert all(pages > 0 for pages in found["pages"])
    assert waits
