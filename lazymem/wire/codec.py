"""Messages to frames and back. Stateless; `connection` knows what may be said when.

`encode` refuses what `decode` would refuse: a message that leaves is one that the peer can take.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from lazymem.digests import DIGEST_BYTES
from lazymem.errors import LocalProtocolError, RemoteProtocolError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire import frame, limits
from lazymem.wire.frame import FrameType
from lazymem.wire.messages import (
    Cancel,
    Cancelled,
    Capability,
    Digests,
    Encoding,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    FetchFlag,
    FileData,
    FileStored,
    Goodbye,
    Hello,
    Level,
    Limits,
    Message,
    Packed,
    Pages,
    Ping,
    Pong,
    PublishedFile,
    ReadFile,
    StoreFile,
    Welcome,
)
from lazymem.wire.rules import problem

Buffer = bytes | bytearray

COPY_UP_TO_BYTES = 64 * 1024
"""Page data up to this comes as its own `bytes`, larger as a view of the received buffer: a copy of 64 KiB costs 3 us,
and a view of one page would keep a whole socket read alive."""

FRAME_TYPES: dict[type, FrameType] = {
    Hello: FrameType.HELLO,
    Welcome: FrameType.WELCOME,
    Fetch: FrameType.FETCH,
    Pages: FrameType.PAGES,
    FetchDigests: FrameType.FETCH_DIGESTS,
    Digests: FrameType.DIGESTS,
    ReadFile: FrameType.READ_FILE,
    FileData: FrameType.FILE_DATA,
    Cancel: FrameType.CANCEL,
    Cancelled: FrameType.CANCELLED,
    Error: FrameType.ERROR,
    Ping: FrameType.PING,
    Pong: FrameType.PONG,
    Goodbye: FrameType.GOODBYE,
    StoreFile: FrameType.STORE_FILE,
    FileStored: FrameType.FILE_STORED,
    Packed: FrameType.PACKED,
}

_HEADER_AND_PAGES = struct.Struct(frame.HEADER.format + frame.PAGES.format[1:])
_HEADER_AND_RANGE = struct.Struct(frame.HEADER.format + frame.RANGE.format[1:])
_ENCODINGS = {int(encoding): encoding for encoding in Encoding}
_RAW, _ZERO = int(Encoding.RAW), int(Encoding.ZERO)
_FETCH, _PAGES = int(FrameType.FETCH), int(FrameType.PAGES)
_FETCH_FLAGS = {bits: FetchFlag(bits) for bits in range(8)}
_KNOWN_CAPABILITIES = int(Capability.ZSTD | Capability.LEARN | Capability.PACKED | Capability.VOUCH | Capability.SUMS)


# ---- out -------------------------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """The frame of `message`.

    Raises:
        LocalProtocolError: the message breaks a rule that the peer would hold us to.
    """
    wrong = problem(message)
    if wrong is not None:
        raise LocalProtocolError(f"refused to send {wrong}")
    try:
        if type(message) is Pages:
            return _encode_pages(message)
        if type(message) is Fetch and len(message.ranges) == 1:
            return _encode_small_fetch(message)
        frame_type = FRAME_TYPES[type(message)]
        payload = _ENCODERS[type(message)](message)
        flags = _flags(message)
        request_id: int = getattr(message, "id", 0)
        header = frame.HEADER.pack(len(payload), frame_type, flags, 0, request_id)
    except (struct.error, UnicodeEncodeError, KeyError) as error:
        raise LocalProtocolError(f"cannot encode {type(message).__name__}: {error}") from error
    sender = next(iter(frame.RULES[frame_type].senders))
    wrong = frame.header_problem(sender, len(payload), frame_type, flags, 0, request_id)
    if wrong is not None:
        raise LocalProtocolError(f"refused to send {wrong}")
    return header + payload


def encode_parts(message: Message) -> tuple[bytes | memoryview, ...]:
    """As `encode`, in pieces to be sent one after the other: large page data is not copied. Raises as `encode`."""
    if not isinstance(message, Pages | Packed) or len(message.data) <= COPY_UP_TO_BYTES // 4:
        return (encode(message),)
    wrong = problem(message)
    if wrong is not None:
        raise LocalProtocolError(f"refused to send {wrong}")
    if type(message) is Packed:
        return (_packed_head(message), message.data)
    assert type(message) is Pages
    return (_pages_head(message) + message.digests, message.data)


def raw_head(request_id: int, start: int, count: int) -> bytes:
    """What stands before the bytes of pages that end an answer as they are (PAGES, RAW, final, no digests)."""
    length = frame.PAGES.size + count * PAGE_SIZE
    return _HEADER_AND_PAGES.pack(length, _PAGES, frame.FINAL, 0, request_id, start, count, _RAW, 0)


def zero_frame(request_id: int, start: int, count: int) -> bytes:
    """The whole frame of zero pages that end an answer (PAGES, ZERO, final)."""
    length = frame.PAGES.size
    return _HEADER_AND_PAGES.pack(length, FrameType.PAGES, frame.FINAL, 0, request_id, start, count, Encoding.ZERO, 0)


def lone_range(data: bytes) -> tuple[int, int, int, int] | None:
    """Id, flags, first page and count of a FETCH of one range, if `data` is exactly that frame and legal by itself."""
    if len(data) != _HEADER_AND_RANGE.size:
        return None
    length, number, flags, reserved, request_id, start, count = _HEADER_AND_RANGE.unpack(data)
    if number != _FETCH or length != frame.RANGE.size or flags > 3 or reserved or not request_id or not count:
        return None
    return request_id, flags, start, count


def lone_fetch(request_id: int, start: int, count: int, flags: int) -> bytes:
    """The frame of a FETCH of one range; the caller knows that it is legal."""
    length = frame.RANGE.size
    return _HEADER_AND_RANGE.pack(length, _FETCH, flags, 0, request_id, start, count)


def lone_pages(data: bytes) -> tuple[int, int, int, bytes | None] | None:
    """Id, first page, count and bytes (None: all zero) of a PAGES that ends an answer, uncompressed and without
    digests, if `data` is exactly that frame and legal by itself."""
    if len(data) < _HEADER_AND_PAGES.size:
        return None
    length, number, flags, reserved, request_id, start, count, encoding, zero = _HEADER_AND_PAGES.unpack_from(data)
    if number != FrameType.PAGES or flags != frame.FINAL or reserved or zero or frame.HEADER.size + length != len(data):
        return None
    held = len(data) - _HEADER_AND_PAGES.size
    if encoding == _RAW:
        if held != count * PAGE_SIZE or not 1 <= count <= limits.MAX_FRAME_PAGES:
            return None
        return request_id, start, count, data[_HEADER_AND_PAGES.size :]
    if encoding != _ZERO or held or not 1 <= count <= limits.MAX_FRAME_PAGES:
        return None
    return request_id, start, count, None


def _encode_pages(message: Pages) -> bytes:
    return b"".join((_pages_head(message), message.digests, message.data))


def _pages_head(message: Pages) -> bytes:
    flags = (frame.FINAL if message.final else 0) | (frame.WITH_DIGESTS if message.digests else 0)
    if message.id == 0:
        raise LocalProtocolError("refused to send PAGES with id 0")
    length = frame.PAGES.size + len(message.digests) + len(message.data)
    pages = message.pages
    return _HEADER_AND_PAGES.pack(
        length, FrameType.PAGES, flags, 0, message.id, pages.start, pages.count, message.encoding, 0
    )


def _packed_head(message: Packed) -> bytes:
    if message.id == 0:
        raise LocalProtocolError("refused to send PACKED with id 0")
    length = frame.PACKED.size + len(message.data)
    header = frame.HEADER.pack(length, FrameType.PACKED, frame.FINAL if message.final else 0, 0, message.id)
    return header + frame.PACKED.pack(message.first, message.count, message.encoding, 0)


def _encode_packed(message: Packed) -> bytes:
    return frame.PACKED.pack(message.first, message.count, message.encoding, 0) + message.data


def _encode_small_fetch(message: Fetch) -> bytes:
    """One range, which is what a fault asks for: one call of pack, and `problem` has checked all else."""
    if message.id == 0 or int(message.flags) not in _FETCH_FLAGS:
        raise LocalProtocolError("refused to send FETCH with id 0 or unknown flags")
    pages = message.ranges[0]
    length = frame.RANGE.size
    return _HEADER_AND_RANGE.pack(length, FrameType.FETCH, message.flags, 0, message.id, pages.start, pages.count)


def _flags(message: Message) -> int:
    if type(message) is Fetch:
        return int(message.flags)
    return frame.FINAL if isinstance(message, Digests | Packed) and message.final else 0


def _encode_hello(message: Hello) -> bytes:
    fields = (message.version_min, message.version_max, int(message.capabilities))
    return frame.HELLO.pack(frame.MAGIC, *fields) + message.name.encode()


def _encode_welcome(message: Welcome) -> bytes:
    name = message.name.encode()
    head = frame.WELCOME.pack(
        message.version,
        int(message.hashed),
        int(message.capabilities),
        message.limits.max_request_pages,
        message.limits.max_request_ranges,
        message.limits.max_requests,
        message.ram_bytes,
        message.vmstate_bytes,
        message.working_set_bytes,
        message.identity,
        len(name),
        0,
        len(message.manifest),
    )
    return head + name + message.manifest


def _encode_fetch(message: Fetch) -> bytes:
    pack = frame.RANGE.pack
    return b"".join([pack(pages.start, pages.count) for pages in message.ranges])


def _encode_store_file(message: StoreFile) -> bytes:
    return frame.STORE_FILE.pack(message.file, message.offset, message.total_bytes, 0) + message.data


def _encode_text(text: str) -> bytes:
    """Cut at a character's border rather than refused: an error must not fail because it has much to say."""
    return text.encode(errors="replace")[: limits.MAX_TEXT_BYTES].decode(errors="ignore").encode()


def _nothing(message: Message) -> bytes:
    return b""


_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    Hello: _encode_hello,
    Welcome: _encode_welcome,
    Fetch: _encode_fetch,
    FetchDigests: lambda message: frame.FETCH_DIGESTS.pack(message.level, message.count, message.first),
    Digests: lambda message: frame.DIGESTS.pack(message.level, 0, message.index) + message.data,
    ReadFile: lambda message: frame.READ_FILE.pack(message.file, message.length, message.offset),
    FileData: lambda message: message.data,
    Cancel: _nothing,
    Cancelled: _nothing,
    Error: lambda message: frame.ERROR.pack(message.code, 0) + _encode_text(message.text),
    Ping: _nothing,
    Pong: _nothing,
    Goodbye: lambda message: _encode_text(message.reason),
    StoreFile: _encode_store_file,
    FileStored: _nothing,
    Packed: _encode_packed,
}


# ---- in --------------------------------------------------------------------------------------------------------


def decode(number: int, flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> Message:
    """The message of a frame whose header was checked (`frame.header_problem`); its payload is ``buffer[start:end]``.

    Raises:
        RemoteProtocolError: the payload is not one.
    """
    try:
        message = _DECODERS[number](flags, request_id, buffer, start, end)
    except (ValueError, struct.error) as error:  # UnicodeDecodeError, enum lookups, empty ranges are ValueErrors
        raise RemoteProtocolError(f"the peer sent a bad {FrameType(number).name}: {error}") from error
    wrong = problem(message)
    if wrong is not None:
        raise RemoteProtocolError(f"the peer sent {wrong}")
    return message


def _decode_pages(flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> Pages:
    first, count, encoding, reserved = frame.PAGES.unpack_from(buffer, start)
    if reserved:
        raise ValueError("reserved field is not 0")
    if not 1 <= count <= limits.MAX_FRAME_PAGES:
        raise ValueError(f"{count} pages")
    start += frame.PAGES.size
    digests = b""
    if flags & frame.WITH_DIGESTS:
        digests = bytes(buffer[start : start + count * DIGEST_BYTES])
        start += count * DIGEST_BYTES
        if start > end:
            raise ValueError("cut digests")
    if encoding not in _ENCODINGS:
        raise ValueError(f"unknown encoding {encoding}")
    return Pages(
        request_id,
        PageRange(first, count),
        _ENCODINGS[encoding],
        _slice(buffer, start, end),
        digests,
        bool(flags & frame.FINAL),
    )


def _decode_packed(flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> Packed:
    first, count, encoding, reserved = frame.PACKED.unpack_from(buffer, start)
    if reserved:
        raise ValueError("reserved field is not 0")
    if encoding not in _ENCODINGS:
        raise ValueError(f"unknown encoding {encoding}")
    data = _slice(buffer, start + frame.PACKED.size, end)
    return Packed(request_id, first, count, _ENCODINGS[encoding], data, bool(flags & frame.FINAL))


def _slice(buffer: Buffer, start: int, end: int) -> bytes | memoryview:
    if end - start <= COPY_UP_TO_BYTES:
        return bytes(buffer[start:end])
    return memoryview(buffer)[start:end]


def _decode_hello(flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> Hello:
    magic, version_min, version_max, capabilities = frame.HELLO.unpack_from(buffer, start)
    if magic != frame.MAGIC:
        raise ValueError("it does not speak lazymem's protocol")
    name = buffer[start + frame.HELLO.size : end].decode()
    return Hello(name, version_min, version_max, Capability(capabilities & _KNOWN_CAPABILITIES))


def _decode_welcome(flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> Welcome:
    fields = frame.WELCOME.unpack_from(buffer, start)
    version, hashed, capabilities, pages, ranges, requests, ram, vmstate, working_set, identity, name, zero, text = (
        fields
    )
    start += frame.WELCOME.size
    if hashed > 1 or zero or start + name + text != end:
        raise ValueError("lengths or flags do not fit")
    return Welcome(
        version=version,
        capabilities=Capability(capabilities & _KNOWN_CAPABILITIES),
        limits=Limits(pages, ranges, requests),
        name=buffer[start : start + name].decode(),
        identity=identity,
        ram_bytes=ram,
        hashed=bool(hashed),
        manifest=bytes(buffer[start + name : end]),
        vmstate_bytes=vmstate,
        working_set_bytes=working_set,
    )


def _decode_fetch(flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> Fetch:
    if (end - start) % frame.RANGE.size:
        raise ValueError("a cut range")
    unpack = frame.RANGE.unpack_from
    ranges = tuple([PageRange(*unpack(buffer, at)) for at in range(start, end, frame.RANGE.size)])
    return Fetch(request_id, ranges, _FETCH_FLAGS[flags])


def _decode_fetch_digests(flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> FetchDigests:
    level, count, first = frame.FETCH_DIGESTS.unpack_from(buffer, start)
    return FetchDigests(request_id, Level(level), first, count)


def _decode_digests(flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> Digests:
    level, reserved, index = frame.DIGESTS.unpack_from(buffer, start)
    if reserved:
        raise ValueError("reserved field is not 0")
    data = bytes(buffer[start + frame.DIGESTS.size : end])
    return Digests(request_id, Level(level), index, data, bool(flags & frame.FINAL))


def _decode_read_file(flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> ReadFile:
    number, length, offset = frame.READ_FILE.unpack_from(buffer, start)
    return ReadFile(request_id, PublishedFile(number), offset, length)


def _decode_store_file(flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> StoreFile:
    number, offset, total, reserved = frame.STORE_FILE.unpack_from(buffer, start)
    if reserved:
        raise ValueError("reserved field is not 0")
    data = bytes(buffer[start + frame.STORE_FILE.size : end])
    return StoreFile(request_id, PublishedFile(number), offset, total, data)


def _decode_error(flags: int, request_id: int, buffer: Buffer, start: int, end: int) -> Error:
    code, reserved = frame.ERROR.unpack_from(buffer, start)
    if reserved:
        raise ValueError("reserved field is not 0")
    return Error(request_id, ErrorCode(code), _printable(buffer[start + frame.ERROR.size : end]))


def _printable(text: Buffer) -> str:
    """A peer's text ends on terminals and in logs: one line, no control characters."""
    return "".join([mark if mark.isprintable() else "?" for mark in text.decode(errors="replace")])


_DECODERS: dict[int, Callable[[int, int, Buffer, int, int], Message]] = {
    FrameType.HELLO: _decode_hello,
    FrameType.WELCOME: _decode_welcome,
    FrameType.FETCH: _decode_fetch,
    FrameType.PAGES: _decode_pages,
    FrameType.PACKED: _decode_packed,
    FrameType.FETCH_DIGESTS: _decode_fetch_digests,
    FrameType.DIGESTS: _decode_digests,
    FrameType.READ_FILE: _decode_read_file,
    FrameType.FILE_DATA: lambda flags, request_id, buffer, start, end: FileData(request_id, bytes(buffer[start:end])),
    FrameType.CANCEL: lambda flags, request_id, *_: Cancel(request_id),
    FrameType.CANCELLED: lambda flags, request_id, *_: Cancelled(request_id),
    FrameType.ERROR: _decode_error,
    FrameType.PING: lambda flags, request_id, *_: Ping(request_id),
    FrameType.PONG: lambda flags, request_id, *_: Pong(request_id),
    FrameType.GOODBYE: lambda flags, request_id, buffer, start, end: Goodbye(_printable(buffer[start:end])),
    FrameType.STORE_FILE: _decode_store_file,
    FrameType.FILE_STORED: lambda flags, request_id, *_: FileStored(request_id),
}
