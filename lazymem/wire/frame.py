"""The layout of frames: header, type numbers, payload structures, who sends what, how long each may be.

`docs/wire.md` prints these tables; a test holds the document equal to this module.
"""

from __future__ import annotations

import enum
import struct

from msgspec import Struct

from lazymem.digests import DIGEST_BYTES
from lazymem.pages import PAGE_SIZE
from lazymem.wire import limits

HEADER = struct.Struct("<IBBHQ")
"""Payload length, type, flags, reserved (0), id."""

HEADER_BYTES = HEADER.size

MAGIC = b"lazymem\n"
"""First bytes of a HELLO's payload: no other protocol's greeting, and the newline shows a text-mode transfer."""


class Role(enum.Enum):
    CLIENT = "client"
    SERVER = "server"

    __hash__ = object.__hash__  # Enum's own is Python code, and tables are looked up four times a message

    @property
    def peer(self) -> Role:
        return Role.SERVER if self is Role.CLIENT else Role.CLIENT


class FrameType(enum.IntEnum):
    """The numbers are the wire's and never change; a new frame takes a new one."""

    HELLO = 1
    WELCOME = 2
    FETCH = 3
    PAGES = 4
    FETCH_DIGESTS = 5
    DIGESTS = 6
    READ_FILE = 7
    FILE_DATA = 8
    CANCEL = 9
    CANCELLED = 10
    ERROR = 11
    PING = 12
    PONG = 13
    GOODBYE = 14
    STORE_FILE = 15
    FILE_STORED = 16
    PACKED = 17


FINAL = 1
"""Header flag of PAGES, PACKED and DIGESTS: the last frame of the answer."""

WITH_DIGESTS = 2
"""Header flag of PAGES: page digests stand before the data."""

HELLO = struct.Struct("<8sHHI")
"""Magic, lowest and highest version, capabilities; the name follows to the end."""

WELCOME = struct.Struct("<HHIIIIQQQ32sHHI")
"""Version, hashed (0 or 1), capabilities, three limits, RAM, vmstate and working-set bytes, identity, name length,
reserved (0), manifest length; name and manifest follow."""

RANGE = struct.Struct("<QI")
"""FETCH: start page, count; as many as there are."""

PAGES = struct.Struct("<QIHH")
"""Start page, count, encoding, reserved (0); digests and data follow."""

PACKED = struct.Struct("<QIHH")
"""First page, count, encoding, reserved (0); data follows."""

FETCH_DIGESTS = struct.Struct("<IIQ")
"""Level, count, first leaf."""

DIGESTS = struct.Struct("<IIQ")
"""Level, reserved (0), index of the (first) leaf; digests follow."""

READ_FILE = struct.Struct("<IIQ")
"""File, length, offset."""

STORE_FILE = struct.Struct("<IIII")
"""File, offset, bytes in all, reserved (0); data follows."""

ERROR = struct.Struct("<HH")
"""Code, reserved (0); the text follows."""


class Rule(Struct, frozen=True):
    """What is known of a frame from its header alone, checked before a byte of its payload is kept."""

    senders: frozenset[Role]
    min_bytes: int
    max_bytes: int
    """Of the payload."""
    flags: int
    """Bits that may be set."""
    has_id: bool | None
    """True: must not be 0. False: must be 0. None: either."""


_CLIENT = frozenset({Role.CLIENT})
_SERVER = frozenset({Role.SERVER})
_BOTH = _CLIENT | _SERVER

RULES: dict[FrameType, Rule] = {
    FrameType.HELLO: Rule(_CLIENT, HELLO.size, HELLO.size + limits.MAX_NAME_BYTES, 0, False),
    FrameType.WELCOME: Rule(
        _SERVER, WELCOME.size, WELCOME.size + limits.MAX_NAME_BYTES + limits.MAX_MANIFEST_BYTES, 0, False
    ),
    FrameType.FETCH: Rule(_CLIENT, RANGE.size, RANGE.size * limits.MAX_RANGES, 7, True),
    FrameType.PAGES: Rule(
        _SERVER,
        PAGES.size,
        PAGES.size + limits.MAX_FRAME_PAGES * (DIGEST_BYTES + PAGE_SIZE),
        FINAL | WITH_DIGESTS,
        True,
    ),
    FrameType.FETCH_DIGESTS: Rule(_CLIENT, FETCH_DIGESTS.size, FETCH_DIGESTS.size, 0, True),
    FrameType.DIGESTS: Rule(_SERVER, DIGESTS.size + DIGEST_BYTES, DIGESTS.size + limits.MAX_DIGESTS_BYTES, FINAL, True),
    FrameType.READ_FILE: Rule(_CLIENT, READ_FILE.size, READ_FILE.size, 0, True),
    FrameType.FILE_DATA: Rule(_SERVER, 0, limits.MAX_FILE_DATA_BYTES, 0, True),
    FrameType.CANCEL: Rule(_CLIENT, 0, 0, 0, True),
    FrameType.CANCELLED: Rule(_SERVER, 0, 0, 0, True),
    FrameType.ERROR: Rule(_SERVER, ERROR.size, ERROR.size + limits.MAX_TEXT_BYTES, 0, None),
    FrameType.PING: Rule(_BOTH, 0, 0, 0, True),
    FrameType.PONG: Rule(_BOTH, 0, 0, 0, True),
    FrameType.GOODBYE: Rule(_BOTH, 0, limits.MAX_TEXT_BYTES, 0, False),
    FrameType.STORE_FILE: Rule(_CLIENT, STORE_FILE.size + 1, STORE_FILE.size + limits.MAX_STORE_PIECE_BYTES, 0, True),
    FrameType.FILE_STORED: Rule(_SERVER, 0, 0, 0, True),
    FrameType.PACKED: Rule(_SERVER, PACKED.size + 1, PACKED.size + limits.MAX_PAGE_DATA_BYTES, FINAL, True),
}

MAX_PAYLOAD_BYTES = max(rule.max_bytes for rule in RULES.values())


def header_problem(sender: Role, length: int, number: int, flags: int, reserved: int, request_id: int) -> str | None:
    """What is wrong with a header from `sender`, in words; None if nothing is."""
    rule = _BY_NUMBER.get(number)
    if rule is None:
        return f"unknown frame type {number}"
    if not rule.min_bytes <= length <= rule.max_bytes:
        return f"{FrameType(number).name} of {length} bytes, allowed are {rule.min_bytes} to {rule.max_bytes}"
    if sender not in rule.senders:
        return f"a {sender.value} does not send {FrameType(number).name}"
    if flags & ~rule.flags or reserved:
        return f"{FrameType(number).name} with unknown flags 0x{flags:02x} or reserved field 0x{reserved:04x}"
    if rule.has_id is not None and rule.has_id is not bool(request_id):
        return f"{FrameType(number).name} with id {request_id}"
    return None


_BY_NUMBER: dict[int, Rule] = {int(frame_type): rule for frame_type, rule in RULES.items()}
