"""What sender and receiver say to each other: bytes to messages and back. Pure; no sockets, no clocks.

A connection begins with 8 bytes that say what it is (`CONTROL`, or `STATE` or `WARM` and the hand-over's 16-byte id; a
page client's HELLO begins with another second byte). On a control connection each message is a length (4 bytes, little-
endian) and so many bytes of JSON: {"say": WORD, ...}. Words and fields that are not known are refused; everything is
bounded, since whoever can connect can send.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from lazymem.errors import RemoteProtocolError

VERSION = 5

COMES_BACK_VERSION = 2
"""From this one on, whoever comes back for a hand-over that was begun says and hears the same: one side may have been
exchanged for a newer lazymem meanwhile, and the guest is to be had all the same."""

CONTROL = b"lazyhand"
STATE = b"lazystat"
WARM = b"lazywarm"
MAGIC_BYTES = 8
ID_BYTES = 16

MAX_MESSAGE_BYTES = 64 * 1024
"""The longest one names an emulator's options, some KiB."""

MAX_WARM_SECONDS = 3600.0
"""Both sides are only pinged meanwhile, and what is longer under way is no hand-over."""

MAX_LOAD_READS = 8
"""Pages that cross the link beside a state whose guest stands."""

MAX_TEXT = 4000
"""Characters of a reason: the last lines of an emulator's complaint."""


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag_field="say"):
    """The base of all."""


class Hello(Message, frozen=True, tag="hello"):
    """The receiver's first. `handover`: the one that it comes back for, or empty; `boot_id`: which host it is."""

    version: int
    boot_id: str
    handover: str = ""


class Offer(Message, frozen=True, tag="offer", omit_defaults=True):
    """The answer: the guest, and the hand-over's id, under which its RAM is served. Sizes in bytes. `warm_seconds`: for
    so long pages of the running guest may be had as candidates, over a `WARM` connection, before READY is said."""

    version: int
    handover: str
    ram_bytes: int
    emulator: dict[str, Any]
    boot_id: str
    ram_path: str
    running: bool
    warm_seconds: float = 0.0


class No(Message, frozen=True, tag="no"):
    """The other answer: not this receiver. `unknown`: it came back for a hand-over that is none of this sender's."""

    text: str
    unknown: bool = False


class Clock(Message, frozen=True, tag="clock"):
    """The receiver asks for the sender's clock, and is answered with it (Unix time; 0 in the question)."""

    seconds: float = 0.0


class Ready(Message, frozen=True, tag="ready"):
    """The receiver's emulator waits for the state."""


class Arrived(Message, frozen=True, tag="arrived"):
    """So many bytes of the connection that brings the state are at the receiver; said now and then."""

    stream_bytes: int


class Stopped(Message, frozen=True, tag="stopped"):
    """The guest stands, and its pages may be had. `load_reads`: numbers of those that a load of its state reads."""

    load_reads: list[int]


class Received(Message, frozen=True, tag="received"):
    """The whole state is at the receiver: so many bytes."""

    state_bytes: int


class Given(Message, frozen=True, tag="given", omit_defaults=True):
    """The guest is the receiver's, once it has all of its state. `stopped`: when it stood at the source, by that clock
    (0: it stood before). `state_bytes`: of what was sent; 0, as to whoever comes back, where that is not said."""

    stopped: float = 0.0
    state_bytes: int = 0


class Mine(Message, frozen=True, tag="mine"):
    """It runs at the receiver. `downtime_seconds`: None where it cannot be told."""

    downtime_seconds: float | None = None


class Refused(Message, frozen=True, tag="refused"):
    """It will never run at the receiver."""

    text: str = ""


class Whole(Message, frozen=True, tag="whole"):
    """The receiver needs the source no more. `report`: its figures."""

    report: dict[str, Any] = {}


class Done(Message, frozen=True, tag="done"):
    """The source has let go."""


class Void(Message, frozen=True, tag="void"):
    """The source has the guest; this hand-over is over."""

    text: str = ""


class Ping(Message, frozen=True, tag="ping"):
    """Does the other side live?"""


class Pong(Message, frozen=True, tag="pong"):
    """It does."""


Any_ = (
    Hello
    | Offer
    | No
    | Clock
    | Ready
    | Arrived
    | Stopped
    | Received
    | Given
    | Mine
    | Refused
    | Whole
    | Done
    | Void
    | Ping
    | Pong
)  # what a decoder takes

_DECODER = msgspec.json.Decoder(Any_)


def encode(message: Message) -> bytes:
    """The message as it goes over the wire."""
    text = msgspec.json.encode(message)
    if len(text) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"a message of {len(text)} bytes; at most {MAX_MESSAGE_BYTES} are taken")
    return len(text).to_bytes(4, "little") + text


class Receiver:
    """Bytes in, messages out."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are whole now.

        Raises:
            RemoteProtocolError: too long, no JSON, or no message.
        """
        self._data += data
        found: list[Message] = []
        while len(self._data) >= 4:
            length = int.from_bytes(self._data[:4], "little")
            if length > MAX_MESSAGE_BYTES:
                raise RemoteProtocolError(f"the other side sends a message of {length} bytes")
            if len(self._data) < 4 + length:
                break
            found.append(_decode(bytes(self._data[4 : 4 + length])))
            del self._data[: 4 + length]
        return found


def _decode(text: bytes) -> Message:
    try:
        message: Message = _DECODER.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"the other side sends what is no message of a hand-over: {error}") from error
    return message


def short(text: str) -> str:
    """The end of a text that may be long."""
    return text[-MAX_TEXT:]
