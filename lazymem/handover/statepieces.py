"""The device state as it goes over the link: pieces, each compressed where that pays, and a mark behind the last. Pure.

A piece is its length, the length as it is sent (4 bytes each, little-endian), and so many bytes: a zstd frame, or the
piece itself where both lengths are the same. Both lengths 0: that was all, and a connection that ends before that has
broken.

Most of what has to go while the guest stands is a framebuffer that it writes all the time, whose pixels are much alike.
An emulator compresses none of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import zstandard

from lazymem.errors import SaveStreamError

MAX_PIECE_BYTES = 256 * 1024
"""What one read of the emulator's socket brings at most: small beside what is under way, and 0.3 ms of compressing."""

_LENGTHS = struct.Struct("<II")
_END = _LENGTHS.pack(0, 0)

_LEVEL = 1
"""Higher ones take longer than a 1 Gb/s link for what they save."""

_LEAST_SAVING = 8
"""Sent compressed if it is at least an eighth smaller; less does not pay for the receiver's work."""


class Packer:
    """For one thread: a zstd context is not to be shared."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
        self._zstd.compress(bytes(MAX_PIECE_BYTES))  # it makes its tables now, and not when the guest stands

    def pack(self, data: bytes) -> bytes:
        """`data`: 1 to `MAX_PIECE_BYTES` bytes."""
        packed = self._zstd.compress(data)
        if len(packed) > len(data) - len(data) // _LEAST_SAVING:
            packed = data
        return _LENGTHS.pack(len(data), len(packed)) + packed

    @staticmethod
    def end() -> bytes:
        """Behind the last piece."""
        return _END


class Unpacker:
    """`ended`: the mark was there."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_PIECE_BYTES)
        self._data = bytearray()
        self.ended = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The pieces that are whole now.

        Raises:
            SaveStreamError: they make no sense.
        """
        self._data += data
        while len(self._data) >= _LENGTHS.size:
            if self.ended:
                raise SaveStreamError("the source sends more behind the end of its device state")
            length, packed_length = _LENGTHS.unpack_from(self._data)
            if length == packed_length == 0:
                self.ended = True
                del self._data[: _LENGTHS.size]
                continue
            if not 0 < packed_length <= length <= MAX_PIECE_BYTES:
                raise SaveStreamError(f"the source sends a piece of {length} bytes of device state in {packed_length}")
            if len(self._data) < _LENGTHS.size + packed_length:
                return
            packed = bytes(self._data[_LENGTHS.size : _LENGTHS.size + packed_length])
            del self._data[: _LENGTHS.size + packed_length]
            yield packed if packed_length == length else self._unpacked(packed, length)

    def _unpacked(self, packed: bytes, length: int) -> bytes:
        try:
            # Nothing is allocated on the frame's own word.
            if zstandard.frame_content_size(packed) != length:
                raise SaveStreamError("a piece of the device state is not of the size that it should be")
            data = self._zstd.decompress(packed, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise SaveStreamError(f"the device state arrives damaged: {error}") from error
        if len(data) != length:
            raise SaveStreamError("a piece of the device state is not of the size that it should be")
        return data
