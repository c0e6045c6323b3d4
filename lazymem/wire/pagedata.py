"""The data of PAGES frames: zero pages, raw pages, zstd. Pure, but for a compressor kept for each thread."""

from __future__ import annotations

import threading

import zstandard

from lazymem.errors import RemoteProtocolError
from lazymem.pages import PAGE_SIZE, is_zero
from lazymem.wire.limits import MAX_PAGE_DATA_BYTES
from lazymem.wire.messages import Capability, Encoding, Pages

FAST_LEVEL = 1
"""Guest memory is either easy (text, tables) or hopeless; higher levels cost more than most links they save."""

THOROUGH_LEVEL = 3
"""For links that are slow beside it: a tenth less, for half again the work."""

MIN_SAVING = 8
"""Compressed data is sent if it is at least an eighth smaller; less does not pay for the receiver's work."""

_MAX_WINDOW_BYTES = 2 * MAX_PAGE_DATA_BYTES
"""No frame of ours needs a larger one; zstd itself would allocate up to 128 MiB on a peer's word."""


class _PerThread(threading.local):
    """zstd contexts must not be shared by threads that work at the same time, and are costly to make."""

    def __init__(self) -> None:
        self.compressors = {
            level: zstandard.ZstdCompressor(level=level, write_content_size=True)
            for level in (FAST_LEVEL, THOROUGH_LEVEL)
        }
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)


_contexts = _PerThread()


def encode_pages(data: bytes | memoryview, capabilities: Capability) -> tuple[Encoding, bytes | memoryview]:
    """How to send whole pages (`data`: 1 to 256 of them): as zeros, compressed where it pays, or as they are."""
    if is_zero(data):
        return Encoding.ZERO, b""
    return compress_pages(data, FAST_LEVEL if capabilities & Capability.ZSTD else 0)


def compress_pages(data: bytes | memoryview, level: int) -> tuple[Encoding, bytes | memoryview]:
    """How to send whole pages that are not all zero, with `FAST_LEVEL`, `THOROUGH_LEVEL`, or 0 for as they are."""
    if level:
        compressed = _contexts.compressors[level].compress(data)
        if len(compressed) <= len(data) - len(data) // MIN_SAVING:
            return Encoding.ZSTD, compressed
    return Encoding.RAW, data


def decode_pages(pages: Pages) -> bytes | memoryview | None:
    """The bytes of `pages` (``count * 4096``); None if they are all zero. They are not verified.

    Nothing is allocated before the size that the zstd frame claims was found to be the expected one.

    Raises:
        RemoteProtocolError: the data does not decode to exactly so many pages.
    """
    if pages.encoding == Encoding.ZERO:
        return None
    return decode_data(pages.encoding, pages.data, pages.pages.count)


def decode_data(encoding: Encoding, encoded: bytes | memoryview, count: int) -> bytes | memoryview:
    """As `decode_pages`, of `count` pages that are not called zero."""
    whole = count * PAGE_SIZE
    if encoding == Encoding.RAW:
        if len(encoded) != whole:
            raise RemoteProtocolError(f"{len(encoded)} bytes for {count} pages")
        return encoded
    try:
        if zstandard.frame_content_size(encoded) != whole:
            raise RemoteProtocolError(f"a zstd frame that does not hold {count} pages")
        data = _contexts.decompressor.decompress(encoded, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(f"a broken zstd frame: {error}") from error
    if len(data) != whole:
        raise RemoteProtocolError(f"{len(data)} bytes for {count} pages")
    return data
