"""The device state as it goes over the link: pieces, each compressed where that pays, and a mark behind the last. Pure.

A piece is its form (a byte), its length, the length as it is sent (4 bytes each, little-endian), and so many bytes:

    0  the piece itself; both lengths are the same, and 0 behind the last piece: that was all
    1  a zstd frame of it
    2  a zstd frame of its differences in planes (`planes`)
    3  candidates (`candidates`): an offset (4 bytes), and a piece of form 0 to 2. No part of the state: they are kept
    4  a piece with candidates in it: how many (4 bytes), a table, and a piece of form 0 to 2 that is the rest of it

A connection that ends before the mark has broken.

Most of what has to go while the guest stands is a framebuffer that it writes all the time, whose pixels are much alike.
An emulator compresses none of it. A picture is less than half as large as differences, a console of text is larger: of
each piece a sample from its middle says which.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum

import zstandard

from lazymem.errors import SaveStreamError
from lazymem.handover.candidates import ENTRY_BYTES, Candidates, Reference, cut_out
from lazymem.handover.planes import Planes
from lazymem.pages import PAGE_SIZE

MAX_PIECE_BYTES = 256 * 1024
"""What one read of the emulator's socket brings at most: small beside what is under way, and 0.3 ms of compressing."""


class _Form(IntEnum):
    AS_IT_IS = 0
    ZSTD = 1
    PLANES = 2
    CANDIDATES = 3
    REFERRING = 4


_SIMPLE = (_Form.AS_IT_IS, _Form.ZSTD, _Form.PLANES)


_HEADER = struct.Struct("<BII")
_END = _HEADER.pack(_Form.AS_IT_IS, 0, 0)

_COUNT = struct.Struct("<I")
"""In front of what is inside of a piece of form 3 or 4."""

_MOST_AROUND_BYTES = _COUNT.size + MAX_PIECE_BYTES // PAGE_SIZE * ENTRY_BYTES + _HEADER.size
"""What form 3 or 4 adds to the piece inside."""

_LEVEL = 1
"""Higher ones take longer than a 1 Gb/s link for what they save."""

_PLANES_HASH_LOG, _PLANES_MATCH = 10, 7
"""Other than the level's own: of a moving picture half the time, and a tenth less is left. Its planes repeat little,
and short repetitions are in the way of entropy coding."""

_LEAST_SAVING = 8
"""Sent compressed if it is at least an eighth smaller; less does not pay for the receiver's work."""

_SAMPLE_BYTES = 8 * 1024
"""Two lines of a screen. 0.04 ms for both forms of it, a tenth of its piece's; of noise 0.015."""


_WRONG_SIZE = "a piece of the device state is not of the size that it should be"


class Packer:
    """For one thread: a zstd context is not to be shared. To make the first takes 0.1 s (`planes`)."""

    def __init__(self) -> None:
        self._plain = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
        parameters = zstandard.ZstdCompressionParameters.from_level(
            _LEVEL, hash_log=_PLANES_HASH_LOG, min_match=_PLANES_MATCH, write_content_size=True
        )
        self._of_planes = zstandard.ZstdCompressor(compression_params=parameters)
        self._planes = Planes(MAX_PIECE_BYTES)
        # Tables and buffers are made now, and not when the guest stands.
        self._plain.compress(self._planes.take_apart(bytes(MAX_PIECE_BYTES)))
        self._of_planes.compress(bytes(MAX_PIECE_BYTES))

    def pack(self, data: bytes) -> bytes:
        """`data`: 1 to `MAX_PIECE_BYTES` bytes."""
        if self._is_picture(data):
            form, packed = _Form.PLANES, self._compressed_planes(data)
        else:
            form, packed = _Form.ZSTD, self._plain.compress(data)
        if len(packed) > len(data) - len(data) // _LEAST_SAVING:
            form, packed = _Form.AS_IT_IS, data
        return _HEADER.pack(form, len(data), len(packed)) + packed

    def pack_candidates(self, offset: int, data: bytes) -> bytes:
        """`data`: whole pages, as `pack` has it; `offset`: where they are in their block."""
        return _around(_Form.CANDIDATES, len(data), _COUNT.pack(offset) + self.pack(data))

    def pack_referring(self, data: bytes, found: Sequence[Reference]) -> bytes:
        """`found`: the candidates in `data`, at least one, by ascending positions, and something is left beside them:
        each page has a record in front."""
        table, rest = cut_out(data, found)
        return _around(_Form.REFERRING, len(data), _COUNT.pack(len(found)) + table + self.pack(rest))

    def _is_picture(self, data: bytes) -> bool:
        if len(data) < _SAMPLE_BYTES:
            return False
        begin = (len(data) - _SAMPLE_BYTES) // 2
        sample = memoryview(data)[begin : begin + _SAMPLE_BYTES]
        return len(self._compressed_planes(sample)) < len(self._plain.compress(sample))

    def _compressed_planes(self, data: bytes | memoryview) -> bytes:
        return self._of_planes.compress(self._planes.take_apart(data))

    @staticmethod
    def end() -> bytes:
        """Behind the last piece."""
        return _END


def _around(form: _Form, length: int, content: bytes) -> bytes:
    return _HEADER.pack(form, length, len(content)) + content


class Unpacker:
    """`ended`: the mark was there. For one thread; to make the first takes 0.1 s (`planes`)."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_PIECE_BYTES)
        self._planes = Planes(MAX_PIECE_BYTES)
        self._planes.put_together(bytes(MAX_PIECE_BYTES))  # as in `Packer`
        self._candidates = Candidates()
        self._data = bytearray()
        self._rest = 0
        self.ended = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The pieces that are whole now, and of one that came as it is what is there: a piece of noise takes some ms.

        Raises:
            SaveStreamError: they make no sense.
        """
        self._data += data
        while True:
            if self._rest and self._data:
                found = bytes(self._data[: self._rest])
                del self._data[: self._rest]
                self._rest -= len(found)
                yield found
            if self._rest or len(self._data) < _HEADER.size:
                return
            if self.ended:
                raise SaveStreamError("the source sends more behind the end of its device state")
            form, length, packed_length = _HEADER.unpack_from(self._data)
            if form == length == packed_length == 0:
                self.ended = True
                del self._data[: _HEADER.size]
                continue
            if not _makes_sense(form, length, packed_length):
                raise SaveStreamError(
                    f"the source sends a piece of {length} bytes of device state in {packed_length}, form {form}"
                )
            if form == _Form.AS_IT_IS:
                self._rest = length
                del self._data[: _HEADER.size]
                continue
            if len(self._data) < _HEADER.size + packed_length:
                return
            packed = bytes(self._data[_HEADER.size : _HEADER.size + packed_length])
            del self._data[: _HEADER.size + packed_length]
            if form == _Form.CANDIDATES:
                self._keep(packed, length)
            else:
                yield self._together(packed, length) if form == _Form.REFERRING else self._simple(form, packed, length)

    def _keep(self, content: bytes, length: int) -> None:
        data = self._inside(content, _COUNT.size)
        if len(data) != length:
            raise SaveStreamError(_WRONG_SIZE)
        self._candidates.keep(_COUNT.unpack_from(content)[0], data)

    def _together(self, content: bytes, length: int) -> bytes:
        if len(content) < _COUNT.size:
            raise SaveStreamError(_WRONG_SIZE)
        begin = _COUNT.size + _COUNT.unpack_from(content)[0] * ENTRY_BYTES
        rest = self._inside(content, begin)
        return self._candidates.put_together(content[_COUNT.size : begin], rest, length)

    def _inside(self, content: bytes, begin: int) -> bytes:
        """What the piece is that begins there, and ends with the content."""
        if len(content) < begin + _HEADER.size:
            raise SaveStreamError(_WRONG_SIZE)
        form, length, packed_length = _HEADER.unpack_from(content, begin)
        packed = content[begin + _HEADER.size :]
        if form not in _SIMPLE or not _makes_sense(form, length, packed_length) or len(packed) != packed_length:
            raise SaveStreamError(f"the source sends a piece of form {form} within another one")
        return self._simple(form, packed, length)

    def _simple(self, form: int, packed: bytes, length: int) -> bytes:
        if form == _Form.AS_IT_IS:
            return packed
        data = self._unpacked(packed, length)
        return data if form == _Form.ZSTD else self._planes.put_together(data)

    def _unpacked(self, packed: bytes, length: int) -> bytes:
        try:
            # Nothing is allocated on the frame's own word.
            if zstandard.frame_content_size(packed) != length:
                raise SaveStreamError(_WRONG_SIZE)
            data = self._zstd.decompress(packed, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise SaveStreamError(f"the device state arrives damaged: {error}") from error
        if len(data) != length:
            raise SaveStreamError(_WRONG_SIZE)
        return data


def _makes_sense(form: int, length: int, packed_length: int) -> bool:
    if form == _Form.AS_IT_IS:
        return 0 < packed_length == length <= MAX_PIECE_BYTES
    if form in (_Form.CANDIDATES, _Form.REFERRING):
        return 0 < length <= MAX_PIECE_BYTES and 0 < packed_length <= MAX_PIECE_BYTES + _MOST_AROUND_BYTES
    return form in _SIMPLE and 0 < packed_length < length <= MAX_PIECE_BYTES
